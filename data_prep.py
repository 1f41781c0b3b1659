"""Preference rows, or with --task sft SFT rows, to token ids on disk: prefs.jsonl -> packed/.

Input: prefs.jsonl or sft.jsonl. Output: packed/ (tokens.npy, bounds.npy, lines.npy, meta.json, rejects.jsonl; see packed.py).

    python data_prep.py --in examples/prefs.jsonl
    python data_prep.py --task sft --in examples/prefs.jsonl --columns response=chosen --out packed-sft

Where rows come from is in sources.py, the forms that they may have in rows.py, those of SFT rows in demonstrations.py. Prompt
and response are made into ids separately and joined; every response ends in the end token. Nothing is truncated: a row that
cannot be used whole is left out and listed with its reason, so that rows in = pairs kept + rows listed. An SFT row is packed as
a pair with nothing rejected.
lines.npy int64 (pairs,) is the line of the source (its place in the list, for a .json) that each pair came from.
"""

import functools
import json
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import config
from cli import exits
from cli.parser import arg
from files import InputError
from preferences import sources
from preferences.reuse import COLUMNS, default_model, said_of, up_to_date

UNUSED = {
    "shift_logits",
    "use_mixed_precision",
    "lora_r",
    "lora_alpha",
    "lora_targets",
    "load_in_4bit",
    "gradient_checkpointing",
    "states_per_forward",
    "deepspeed",
}  # of ModelArguments, by this script


@dataclass
class PackArguments:
    reuse: bool = arg(
        False,
        "do nothing where --data is complete and was made of the same file, task, tokenizer, template, columns "
        "and max_length",
        heading="Data",
    )


def read_arguments(argv=None):
    """(DataArguments, ModelArguments, PackArguments), checked as far as nothing needs to be loaded for it."""
    groups = config.parse(argv, __doc__, config.DataArguments, config.ModelArguments, PackArguments, hide=UNUSED)
    args, _, own = groups
    if not args.preference_data_path and not own.reuse:
        raise InputError(f"no {said_of(args.task)} given; add --in FILE.jsonl")
    if os.path.exists(args.data) and not os.path.isdir(args.data):
        raise InputError(f"{args.data}: expected a folder for the packed arrays, found a file")
    if args.preference_data_path:
        sources.is_file(args.preference_data_path)
    return groups


def nothing_to_pack(args, model_args, own):
    """Why --reuse leaves nothing to do; None if there is something. Fills in the model."""
    model_args.model_name_or_path = model_args.model_name_or_path or default_model(args.data, own.reuse)
    packed = up_to_date(args, model_args) if own.reuse else None
    if packed is None:
        return None
    return f"{packed.folder}: {len(packed)} {'SFT rows' if packed.task == 'sft' else 'pairs'}, up to date"


def early():
    """Read the arguments; end the process if the packed arrays are there already."""
    exits.end_if(nothing_to_pack(*read_arguments()))


if __name__ == "__main__":
    exits.early(early)  # answers --help, mistakes and "up to date" before the imports below, which take seconds

import numpy as np

import files
from files import shorten
from models import architecture, families, folders, tokenization
from preferences import demonstrations, packed
from preferences.rows import Malformed, find_columns, parse_columns, preference
from preferences.sources import as_text, read_rows, source_sha256
from training import stopping

SMALL = 2000  # rows; below this, starting processes costs more than it saves


# --- text to ids ---


@dataclass
class Encoder:
    """Makes a row's three id lists (of an SFT row, the third is empty); a plain value, that can be sent to other processes."""

    tokenizer: object
    response_tokenizer: object
    template: str  # "chat" or "none"
    end: int
    mask: int
    special: re.Pattern  # the special tokens' strings
    strips: bool  # the template strips what a message says
    max_length: int

    def __call__(self, prompt, *sides):
        """(reason, detail, [prompt, chosen, rejected] ids); reason "" and ids when the row is fit to be kept."""
        said = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        if not "".join(said).strip():
            return "empty prompt", "", [[]] * 3
        if blank := [name for name, side in zip(("chosen", "rejected"), sides) if not side.strip()]:
            return "empty response", " and ".join(blank) if len(sides) == 2 else "", [[]] * 3
        # a special token written out in the text would be read as the token: a mask, an end, a forged turn
        if found := next(filter(None, map(self.special.search, (*said, *sides))), None):
            return "special token in the text", found.group(), [[]] * 3
        try:
            ids = [tokenization.prompt_ids(self.tokenizer, prompt, self.template)]
        except InputError as error:  # the template refuses this row's messages
            return "malformed", str(error), [[]] * 3
        for side in sides:
            side = side.strip() if self.strips else side
            ids.append(tokenization.encode(self.response_tokenizer, side) + [self.end])
        # a tokenizer that normalises may read a special token where none was written: <mask> in full-width letters under NFKC
        if self.mask in ids[0] or any(self.mask in side or self.end in side[:-1] for side in ids[1:]):
            return "special token in the text", "as the tokenizer reads it", [[]] * 3
        ids += [[]] * (3 - len(ids))
        if ids[1] == ids[2]:
            return "chosen equals rejected", "", [[]] * 3
        if (length := len(ids[0]) + max(map(len, ids[1:]))) > self.max_length:
            return "too long", f"{length} tokens, of at most {self.max_length}", [[]] * 3
        return "", "", ids


def make_encoder(args, model_args, tokenizer):
    name, remote = model_args.model_name_or_path, model_args.trust_remote_code
    tokenizer.model_max_length = sys.maxsize  # its warning says nothing here: we drop what is too long
    response_tokenizer = tokenization.response_tokenizer(name, tokenizer, remote)
    response_tokenizer.model_max_length = sys.maxsize
    chat = tokenization.uses_chat(tokenizer, args.template)
    end = (
        tokenization.end_token_id(tokenizer, args.template)
        if model_args.end_token_id is None
        else model_args.end_token_id
    )
    model_config = architecture.load_config(name, remote)
    mask = tokenization.mask_token_id(model_config, tokenizer, model_args.mask_token_id)
    most = min(args.max_length, families.longest(model_config) or args.max_length)
    strips = False
    if chat:
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": " @answer@ "}]
        strips = " @answer@ " not in tokenization.render(tokenizer, messages)
    return Encoder(
        tokenizer,
        response_tokenizer,
        "chat" if chat else "none",
        end,
        mask,
        special_pattern(tokenizer, {mask, end}),
        strips,
        most,
    )


def special_pattern(tokenizer, ids):
    """A pattern of every string that the tokenizer reads as a special token, and of the tokens `ids`."""
    added = tokenizer.added_tokens_decoder
    # all_special_tokens also holds sentencepiece's user-defined pieces, such as a newline, which are plain text
    texts = {
        token
        for token in tokenizer.all_special_tokens
        if (i := tokenizer.convert_tokens_to_ids(token)) not in added or added[i].special
    }
    texts |= {str(token) for token in added.values() if token.special}
    texts |= {tokenizer.convert_ids_to_tokens(i) for i in ids if i < len(tokenizer)}
    return re.compile("|".join(re.escape(text) for text in sorted(texts - {None, ""}, key=len, reverse=True)))


def encode_batch(batch, encoder):
    """One batch of `datasets`: JSON strings in, columns out."""
    done = [encoder(*json.loads(text)) for text in batch["row"]]
    return {
        "reason": [reason for reason, _, _ in done],
        "detail": [detail for _, detail, _ in done],
        **{name: [ids[i] for _, _, ids in done] for i, name in enumerate(("prompt", "chosen", "rejected"))},
    }


def end_with_us(parent):
    """In a process that was just forked off `parent`: end when that is killed, instead of waiting for it for ever."""
    if os.getppid() == parent:  # and not a fork of that process's own
        stopping.when_the_parent_ends(signal.SIGKILL)


def encode_rows(encoder, rows, num_proc):
    """Fill in reason, detail and ids of each row; the same for every num_proc."""
    import datasets  # here, not above: it takes a second, and --reuse has no need of it

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    if num_proc < 0:
        raise InputError(f"--num_proc {num_proc}: expected 0 (one per core) or more")
    num_proc = min(num_proc or (os.cpu_count() if len(rows) >= SMALL else 1), len(rows))
    if num_proc > 1:
        os.register_at_fork(after_in_child=functools.partial(end_with_us, os.getpid()))
    ids = datasets.List(datasets.Value("uint32"))
    columns = {
        "reason": datasets.Value("string"),
        "detail": datasets.Value("string"),
        "prompt": ids,
        "chosen": ids,
        "rejected": ids,
    }
    # Rows travel as JSON: arrow has no column type for "a string or messages". In memory: nothing in the home folder.
    table = datasets.Dataset.from_dict({"row": [json.dumps(row.parts) for row in rows]})
    table = table.map(
        encode_batch,
        batched=True,
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=["row"],
        fn_kwargs={"encoder": encoder},
        features=datasets.Features(columns),
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint="packed",
        desc="tokenizing",
    )
    # In batches: row by row, handing the ids over takes longer than making them. The strings stay Python's.
    table = table.with_format("numpy", columns=["prompt", "chosen", "rejected"], output_all_columns=True)
    done = (row for batch in table.iter(1000) for row in zip(*(batch[name] for name in columns)))
    for row, (reason, detail, *ids) in zip(rows, done, strict=True):
        row.reason, row.detail, row.ids = reason, detail, tuple(part.astype(np.uint32) for part in ids)


# --- the job ---


def prepare(path, args, encoder):
    """(rows, form): all rows of the source, each with ids or with a reason; raises InputError before anything is written."""
    where = f"{path}:" if path.endswith(".jsonl") else f"{path}: row "
    rows = read_rows(path, args.split)
    find, read = find_columns, preference
    if args.task == "sft":
        find, read = demonstrations.find_columns, demonstrations.demonstration
    columns, form = find(rows, parse_columns(args.columns, COLUMNS[args.task]), path)
    for row in rows:
        if not row.reason:
            try:
                row.parts = read(row.value, columns, encoder.template == "chat")
                if encoder.template == "none" and isinstance(row.parts[0], list):
                    raise Malformed(
                        "conversational rows need a chat template, and "
                        + ("--template none was given" if args.template == "none" else "this tokenizer has none")
                    )
            except Malformed as error:
                row.reason, row.detail = error.reason, str(error)
        stop_at_malformed(row, args, where)
    if fit := [row for row in rows if not row.reason]:
        encode_rows(encoder, fit, args.num_proc)
    seen = {}
    for row in rows:
        stop_at_malformed(row, args, where)  # the chat template may refuse a row too
        if not row.reason:
            first = seen.setdefault(files.fingerprint(*row.ids), row.number)
            if first != row.number:
                row.reason, row.detail = "duplicate", f"of {first}"
    return rows, form


def stop_at_malformed(row, args, where):
    if row.reason == "malformed" and args.on_bad_row == "stop":
        raise InputError(f"{where}{row.number}: {row.detail} (--on_bad_row skip leaves such rows out)")


def write(folder, kept, left_out, meta):
    """meta.json goes first and comes back last, so that no half is taken for whole."""
    entries = [
        {
            "line": row.number,
            "reason": row.reason,
            "detail": row.detail,
            "text": shorten(row.value if isinstance(row.value, str) else as_text(row.value), 500),
        }
        for row in left_out
    ]
    (folder / "meta.json").unlink(missing_ok=True)
    lines = np.array([row.number for row in kept], np.int64)
    files.write_array(folder / "lines.npy", lines)
    with files.replacing(folder / "rejects.jsonl") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    packed.write_packed(folder, (row.ids for row in kept), {**meta, "lines": files.fingerprint(lines)})


# --- what is printed ---


def pieces(tokenizer, ids, most=40):
    """The ids as text with the boundaries visible; a long one is cut in the middle."""
    anchor = tokenization.encode(tokenizer, "x")[-1:]  # in front of each token: decoders strip the first one's space
    before = len(tokenizer.decode(anchor))

    def show(part):
        said = [tokenizer.decode(anchor + [int(i)], clean_up_tokenization_spaces=False)[before:] for i in part]
        return ["".join(c if c.isprintable() else repr(c)[1:-1] for c in piece) for piece in said]

    if len(ids) <= most:
        said = show(ids)
    else:
        said = [*show(ids[: most // 2]), f" ... ({len(ids) - most} more) ... ", *show(ids[-most // 2 :])]
    mark = "·" if any("|" in piece for piece in said) else "|"
    return mark + mark.join(said) + mark


def token(tokenizer, number):
    """A token's text and id; the mask of some models is no word of the tokenizer."""
    text = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    return f"{number}" if text is None else f"{text} ({number})"


def summary(args, kept, left_out, tokenizer):
    """Lines to print: counts, lengths, one example, a warning if lengths of preferences differ."""
    names = COLUMNS[args.task]
    dropped = Counter(row.reason for row in left_out)
    lines = [
        f"{args.preference_data_path}: {len(kept) + len(left_out)} rows, {len(kept)} kept, {len(left_out)} dropped"
        + (f", listed in {args.data}/rejects.jsonl" if left_out else "")
    ]
    lines += [f"  {count:6d}  {reason}" for reason, count in dropped.most_common()]
    lengths = np.array([[len(ids) for ids in row.ids] for row in kept])  # (pairs, 3)
    shares = (0, 50, 90, 99, 100)
    lines.append("tokens    " + "".join(f"{name:>8}" for name in ("min", "50%", "90%", "99%", "max")))
    for name, column in zip(names, lengths.T):
        lines.append(f"{name:<10}" + "".join(f"{n:8d}" for n in np.percentile(column, shares, method="nearest")))
    lines.append(f"example, line {kept[0].number}:")
    lines += [f"  {name:<9}{pieces(tokenizer, ids)}" for name, ids in zip(names, kept[0].ids)]
    if args.task == "sft":
        return lines
    chosen, rejected = np.median(lengths[:, 1:], axis=0)
    if max(chosen, rejected) > 1.25 * min(chosen, rejected):
        lines.append(
            f"warning: the median response has {chosen:.0f} tokens if chosen, {rejected:.0f} if rejected; "
            "DPO may learn the length instead of the content"
        )
    return lines


def main(argv=None):
    args, model_args, own = read_arguments(argv)
    if reason := nothing_to_pack(args, model_args, own):
        print(reason)
        return
    source, folder, name = args.preference_data_path, Path(args.data), model_args.model_name_or_path
    tokenizer = tokenization.load_tokenizer(name, model_args.trust_remote_code)
    encoder = make_encoder(args, model_args, tokenizer)
    rows, form = prepare(source, args, encoder)
    kept, left_out = [row for row in rows if not row.reason], [row for row in rows if row.reason]
    assert len(rows) == len(kept) + len(left_out)
    dropped = dict(Counter(row.reason for row in left_out).most_common())
    if not kept:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        first = next((f"; the first, {row.number}: {row.detail}" for row in left_out if row.detail), "")
        raise InputError(f"{source}: holds no row that can be used ({why or 'it is empty'}){first}")
    model_config = architecture.load_config(name, model_args.trust_remote_code)
    embeddings = getattr(model_config, "embedding_size", None) or getattr(model_config, "vocab_size", sys.maxsize)
    if (largest := max(encoder.mask, *(int(ids.max()) for row in kept for ids in row.ids if len(ids)))) >= embeddings:
        raise InputError(
            f"{name}: token id {largest} is beyond the model's embedding of {embeddings} rows; "
            "its tokenizer and config.json do not belong together"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = files.wait_for(folder / ".lock", f"{folder}")  # noqa: F841  ours until this process ends
    if reason := nothing_to_pack(args, model_args, own):  # the process that we waited for has made the same
        print(reason)
        return
    write(
        folder,
        kept,
        left_out,
        {
            "task": args.task,
            "source": source,
            "tokenizer": tokenization.tokenizer_fingerprint(tokenizer),
            "tokenizer_files": folders.tokenizer_files(name),
            "has_chat_template": bool(tokenizer.chat_template),
            "model_name_or_path": name,
            "source_sha256": source_sha256(source, args.split),
            "form": form,
            "columns": parse_columns(args.columns, COLUMNS[args.task]),
            "template": encoder.template,
            "max_length": args.max_length,
            "rows": len(rows),
            "kept": len(kept),
            "dropped": dropped,
            "end_token_id": encoder.end,
            "pad_token_id": tokenizer.eos_token_id,
            "mask_token_id": encoder.mask,
        },
    )
    print(f"form: {form}")
    print(
        f"template: {encoder.template}; mask: {token(tokenizer, encoder.mask)}; end of a response: {token(tokenizer, encoder.end)}"
    )
    if encoder.max_length < args.max_length:
        print(f"{name} reads at most {encoder.max_length} tokens, less than --max_length {args.max_length}")
    print("\n".join(summary(args, kept, left_out, tokenizer)))
    step = "train_dpo.py --loss_type sft" if args.task == "sft" else "score.py"
    print(f"next: python {step} --data {folder} --model_name_or_path {name}")


if __name__ == "__main__":
    exits.run(main)
