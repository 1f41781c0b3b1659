"""What data_prep.py prints of the rows that it packed: counts, lengths, one example with its tokens visible."""

from collections import Counter

import numpy as np

from models import tokenization
from preferences.forms import COLUMNS
from preferences.sources import described

PARTS = COLUMNS | {"kto": ("prompt", "response", "KL's")}  # what the ids of a row are called


def summary(args, kept, left_out, tokenizer):
    """Lines to print of the rows kept and left out; args: DataArguments."""
    # 1. Counts
    listed = f", listed in {args.data}/rejects.jsonl" if left_out else ""
    rows = len(kept) + len(left_out)
    source = described(args.preference_data_path)
    lines = [f"{source}: {rows} rows, {len(kept)} kept, {len(left_out)} dropped{listed}"]
    if len(args.preference_data_path) > 1:
        of_file, kept_of = Counter(row.source for row in [*kept, *left_out]), Counter(row.source for row in kept)
        lines += [f"  {path}: {of_file[path]} rows, {kept_of[path]} kept" for path in args.preference_data_path]
    if args.task == "kto":
        lines += balance(sum(row.label for row in kept), len(kept))
    for reason, count in Counter(row.reason for row in left_out).most_common():
        lines.append(f"  {count:6d}  {reason}")

    # 2. Lengths
    lengths = np.array([list(map(len, row.ids)) for row in kept])  # (pairs, 3)
    lines.append("tokens    " + "".join(f"{name:>8}" for name in ("min", "50%", "90%", "99%", "max")))
    for name, column in zip(PARTS[args.task], lengths.T):
        percentiles = np.percentile(column, (0, 50, 90, 99, 100), method="nearest")
        lines.append(f"{name:<10}" + "".join(f"{length:8d}" for length in percentiles))

    # 3. An example
    example = kept[0].spot if len(args.preference_data_path) == 1 else kept[0].place
    lines.append(f"example, {example}:")
    lines += [f"  {name:<9}{pieces(tokenizer, ids)}" for name, ids in zip(PARTS[args.task], kept[0].ids)]

    # 4. A warning if one side is a quarter longer than the other
    chosen, rejected = np.median(lengths[:, 1:], axis=0)
    if args.task == "preferences" and max(chosen, rejected) > 1.25 * min(chosen, rejected):
        lines.append(
            f"warning: the median response has {chosen:.0f} tokens if chosen, {rejected:.0f} if rejected; "
            "DPO may learn the length instead of the content"
        )
    return lines


def balance(desirable, rows):
    """Lines on how many rows of KTO are desirable; with flags where the two kinds do not weigh about the same.

    KTO's authors advise a ratio of weights times numbers from 1 to 4/3 (arXiv 2402.01306, equation 9).
    """
    undesirable = rows - desirable
    lines = [f"  {desirable:6d}  desirable\n  {undesirable:6d}  undesirable"]
    if not desirable or not undesirable:
        return [*lines, "warning: KTO needs both kinds of responses"]
    if desirable < undesirable:
        lines.append(f"  to weigh both the same, train with --desirable_weight {undesirable / desirable:.2f}")
    elif 3 * desirable > 4 * undesirable:
        lines.append(f"  to weigh both the same, train with --undesirable_weight {desirable / undesirable:.2f}")
    return lines


def pieces(tokenizer, ids, most=40):
    """The ids as text with the boundaries visible; a long one is cut in the middle."""
    anchor = tokenization.encode(tokenizer, "x")[-1:]  # before each token: decoders strip the first one's space
    start = len(tokenizer.decode(anchor))

    def piece(number):
        text = tokenizer.decode([*anchor, int(number)], clean_up_tokenization_spaces=False)[start:]
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)

    texts = [piece(number) for number in ids[:most]]
    if len(ids) > most:
        half = most // 2
        texts[half:] = [f" ... ({len(ids) - most} more) ... ", *(piece(number) for number in ids[-half:])]
    boundary = "·" if any("|" in text for text in texts) else "|"
    return boundary + boundary.join(texts) + boundary


def token(tokenizer, number):
    """A token's text and id. The mask of some models is not in the tokenizer's vocabulary."""
    text = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    return f"{number}" if text is None else f"{text} ({number})"
