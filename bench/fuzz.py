"""data_prep.py against hostile rows: files of odd texts, torn lines and wrong types, every outcome checked.

    python bench/fuzz.py --rows 100000 --seed 0

Each row is made with what must become of it: kept, with texts that its tokens must decode to, or listed for one of the
reasons that hold for it. Never a traceback. A file is refused only if it cannot be read, or if --on_bad_row stop meets
malformed rows, which the message counts and names. Prints a table; exits 1 if anything was wrong.
"""

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hostile import FORMS, HEADERS, MAKERS, MOST, TEMPLATE, decoded, make_extra, make_row, with_extra

EXTRAS = 0.3  # share of files whose rows have a column or field beside those of their form
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data_prep  # noqa: E402
import files  # noqa: E402
from files import InputError  # noqa: E402
from models import tokenization
from preferences import packed  # noqa: E402

# --- what becomes of them ---


@dataclass
class Outcome:
    refused: str = ""  # the sentence
    crash: str = ""  # a traceback
    kept: dict = None  # line: (prompt, chosen, rejected) ids
    listed: dict = None  # line: (reason, detail)
    meta: dict = None
    said: str = ""  # what was printed


def attempt(source, out, model, *flags):
    """data_prep.main on `source`, in this process."""
    shutil.rmtree(out, ignore_errors=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            words = ["--in", source, "--out", out, "--model_name_or_path", model, "--num_proc", 1]
            data_prep.main([str(word) for word in (*words, "--max_length", MOST, *flags)])
    except InputError as error:
        return Outcome(refused=str(error))
    except (Exception, SystemExit):
        return Outcome(crash=traceback.format_exc())
    there = packed.Packed(out)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    numbers = np.load(out / "lines.npy").tolist()
    return Outcome(
        kept=dict(zip(numbers, there, strict=True)),
        meta=there.meta,
        said=said.getvalue(),
        listed={each["line"]: (each["reason"], each["detail"]) for each in rejects},
    )


def rendered(turns):
    """What TEMPLATE makes of (role, content)s."""
    texts = [f"<|start_header_id|>{role}<|end_header_id|>{decoded(content, True)}<|eot_id|>" for role, content in turns]
    return "".join(texts) + "<|start_header_id|>assistant<|end_header_id|>"


class Reader:
    """Tokens back to text, without data_prep's help."""

    def __init__(self, model):
        self.folder, self.tokenizer = model, tokenization.load_tokenizer(str(model))
        self.chat = bool(self.tokenizer.chat_template)
        id_of = self.tokenizer.convert_tokens_to_ids
        self.end = id_of("<|eot_id|>" if self.chat else "</s>")
        self.masks = {id_of("<mask>"), id_of("<|mdm_mask|>")} - {self.tokenizer.unk_token_id}

    def text(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def prompt(self, content):
        if not self.chat:
            return decoded(content, False)
        return rendered([("user", content)])

    def faults(self, ids, parts, strings):
        """What is wrong with the ids of a kept row of `parts`, or, if those are not known, of some of `strings`."""
        prompt, *responses = (each.tolist() for each in ids)
        responses = [each for each in responses if each]
        if self.masks & {*prompt, *sum(responses, [])}:
            yield "a mask among the tokens"
        if any(each[-1] != self.end or self.end in each[:-1] for each in responses):
            yield "an end token too few or too many"
        got = [self.text(prompt), *(self.text(each[:-1]) for each in responses)]
        if parts:
            wanted = [self.prompt(parts[0]), *(decoded(part, self.chat) for part in parts[1:])]
            if got != wanted:
                yield f"tokens say {got}, expected {wanted}"
            return
        sides = {decoded(part, self.chat) for part in strings}
        if got[0] not in map(self.prompt, strings) or not {*got[1:]} <= sides:
            yield f"tokens say {got}, expected strings of the row"


def strings_in(value):
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def check_rows(lines, outcome, reader):
    """What is wrong with an outcome that is no refusal: every row is kept or listed, as it was made to be."""
    rows = {number: row for number, row in enumerate(lines, 1) if not row.blank}
    kept, listed = outcome.kept, outcome.listed
    both = [number for number in kept.keys() & listed.keys() if not rows[number].free]
    count, is_any = outcome.meta["rows"], any(row.free for row in rows.values())  # a free row may hold several pairs
    is_counted = count >= len(rows) if is_any else count == len(rows)
    if both or kept.keys() | listed.keys() != rows.keys() or not is_counted:
        yield f"rows {sorted(rows.keys() ^ (kept.keys() | listed.keys()))[:5]} are not accounted for"
        return
    if len({files.fingerprint(*ids) for ids in kept.values()}) < len(kept):
        yield "a pair is kept twice"
    for number, row in rows.items():
        reason, detail = listed.get(number, ("", ""))
        if number in kept:
            if row.reasons and not row.free and row.reasons != {"too long"}:
                yield f"{number}: kept, though {sorted(row.reasons)}"
            value = () if row.parts else strings_in(json.loads(row.line))
            yield from (f"{number}: {fault}" for fault in reader.faults(kept[number], row.parts, list(value)))
        elif reason == "duplicate":
            first = kept.get(int(detail.removeprefix("of ")))
            if first is None or any(True for _ in reader.faults(first, row.parts, []) if row.parts):
                yield f"{number}: listed as a duplicate {detail}, which it is not"
        elif reason not in row.reasons and not row.free:
            yield f"{number}: listed as {reason} ({detail}), expected {sorted(row.reasons) or 'it to be kept'}"


def check_refusal(lines, sentence, source, stop):
    """What is wrong with a refusal; lines: None where the file cannot be read."""
    if str(source) not in sentence or "\n" in sentence and " rows are malformed " not in sentence:
        yield f"the sentence does not name the file, or is more than one: {sentence}"
    if lines is None:
        return
    bad = [number for number, row in enumerate(lines, 1) if "malformed" in row.reasons]
    free = [number for number, row in enumerate(lines, 1) if row.free]
    count, named = malformed_rows(sentence, source)
    first = [number for number in bad if number <= max(named, default=0)]
    if not (stop and len(bad) <= count <= len(bad) + len(free) and len(named) == min(count, 10)):
        yield f"refused: {sentence}"
    elif not {*first} <= {*named} <= {*bad, *free} or named != sorted(named):
        yield f"names rows {named}, expected {first} and perhaps some of {free}: {sentence}"


def malformed_rows(sentence, source):
    """(how many malformed rows a refusal counts, the numbers of those that it names)."""
    place = "line" if source.suffix == ".jsonl" else "row"
    if several := re.match(rf"{re.escape(str(source))}: (\d+) rows are malformed .*; the first \d+:\n", sentence):
        return int(several[1]), [int(number) for number in re.findall(rf"^  {place} (\d+): ", sentence, re.M)]
    place = ":" if source.suffix == ".jsonl" else ": row "
    one = re.match(rf"{re.escape(str(source))}{place}(\d+): ", sentence)
    return (1, [int(one[1])]) if one else (0, [])


def check(lines, outcome, source, reader, stop):
    """Everything that is wrong with what became of a file."""
    if outcome.crash:
        return ["traceback"]
    if outcome.refused:
        return list(check_refusal(lines, outcome.refused, source, stop))
    if lines is None:
        return ["a file that is not JSON was read"]
    if stop and any("malformed" in row.reasons for row in lines):
        return ["a malformed row did not stop the job"]
    return list(check_rows(lines, outcome, reader))


def check_extra(extra, added, lines, outcome, again, source, reader):
    """What is wrong with what became of a file whose rows have an Extra, which adds the texts `added`.

    again(*flags): the Outcome of the file with more flags.
    """
    if extra.becomes == "refused":
        if f"nothing reads {extra.name} (" not in outcome.refused:
            yield outcome.crash or f"{extra.name} was not refused: {outcome.refused}"
            return
        outcome = again("--ignore_columns", extra.name)
    if outcome.crash or outcome.refused:
        yield outcome.crash or f"refused: {outcome.refused}"
        return
    if extra.becomes == "listed" and f"not read: {extra.name}\n" not in outcome.said:
        yield f"{extra.name} is not said to be left out"
    if extra.becomes != "prompt":
        yield from check_rows(lines, outcome, reader)
        return
    for number, (prompt, *_) in outcome.kept.items():
        got = reader.text(prompt.tolist())
        if not all(each.strip() in got for each in (added[number - 1], lines[number - 1].parts[0])):
            yield f"{number}: the prompt says {got}, expected '{extra.name}' in it: {added[number - 1]}"
    if len(outcome.kept) < len(lines):
        yield f"{len(lines) - len(outcome.kept)} rows are not kept"


# --- the job ---


def make_models(folder):
    """Folders of two models: the embedded tokenizer as it is, and with LLaDA's special tokens, mask and a template."""
    plain, chat = folder / "plain", folder / "chat"
    for place in (plain, chat):
        shutil.copytree(ROOT / "examples" / "tiny", place, ignore=shutil.ignore_patterns("*.safetensors"))
    change(chat / "tokenizer_config.json", chat_template=TEMPLATE, additional_special_tokens=HEADERS)
    mask = tokenization.load_tokenizer(str(chat)).convert_tokens_to_ids("<|mdm_mask|>")
    change(chat / "config.json", mask_token_id=mask, vocab_size=520, embedding_size=520)
    return plain, chat


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def make_rows(rng, size, stop, *kind):
    """`size` rows of a kind (make_row's arguments), the first not spoilt, some twice. stop: few are spoilt."""
    rows = []
    for index in range(size):
        plain = index == 0 or stop and rng.random() < 0.97
        rows.append(make_row(rng, *kind, plain=plain))
    for index in range(1, size):
        if rng.random() < 0.02:
            rows[index] = rng.choice(rows[:index])
    return rows


def run_extra(rng, reader, task, columns, build, has_messages, size, folder):
    """Try a file of `size` rows with an Extra: (rows, what is wrong)."""
    extra, source = make_extra(rng, has_messages), folder / "rows.jsonl"
    made = [make_row(rng, task, columns, build, reader.chat, plain=True) for _ in range(size)]
    lines, added = zip(*(with_extra(row, extra) for row in made))
    source.write_bytes(b"\n".join(row.line for row in lines))

    def again(*flags):
        return attempt(source, folder / "packed", reader.folder, "--task", task, *flags)

    return size, list(check_extra(extra, added, lines, again(), again, source, reader))


def run(rows, seed, folder, per_file=200, show=print):
    """Fuzz with `rows` rows; the counts."""
    folder, counts, rng = Path(folder), Counter(), random.Random(seed)
    readers = [Reader(model) for model in make_models(folder)]
    while counts["rows tried"] < rows:
        # 1. A file
        reader, task = rng.choice(readers), rng.choice(["preferences", "sft"])
        ending = rng.choices(list(MAKERS), (6, 2, 1))[0]
        has_messages = reader.chat and rng.random() < 0.5
        columns, build = rng.choice(FORMS[task, has_messages])
        if rng.random() < EXTRAS:
            tried, faults = run_extra(rng, reader, task, columns, build, has_messages, per_file, folder)
            counts.update(
                {"files": 1, "files with unread columns": 1, "rows tried": tried, "wrong results": len(faults)}
            )
            for fault in faults[:3]:
                show(f"file {counts['files']} ({task}, {columns}, {reader.folder.name}): {fault}")
            continue
        stop = rng.random() < 0.1
        made = make_rows(rng, min(per_file, rows - counts["rows tried"]), stop, task, columns, build, reader.chat)
        source = folder / f"rows{ending}"
        lines = MAKERS[ending](rng, source, made)

        # 2. What becomes of it
        flags = ["--task", task, "--on_bad_row", "stop" if stop else "skip"]
        outcome = attempt(source, folder / "packed", reader.folder, *flags)
        wrong = check(lines, outcome, source, reader, stop)

        # 3. Counts
        tried = made if lines is None else [row for row in lines if not row.blank]
        kept, listed, crashes = outcome.kept or {}, outcome.listed or {}, int(bool(outcome.crash))
        counts.update({"files": 1, "rows tried": len(tried), "kept": len(kept), "listed": len(listed)})
        counts.update({"refused files": int(bool(outcome.refused)), "tracebacks": crashes})
        counts.update({"wrong results": len(wrong) - crashes})
        counts.update(f"listed: {reason}" for reason, _ in listed.values())
        for fault in wrong[:3]:
            kind = f"{task}, {columns}, {reader.folder.name}, {ending}, {flags[-1]}"
            show(f"file {counts['files']} ({kind}): {fault} {outcome.crash}")
    return counts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(args.rows, args.seed, folder)
    names = ("rows tried", "files", "kept", "listed", "refused files", "tracebacks", "wrong results")
    for name in (*names, *sorted(name for name in counts if name not in names)):
        print(f"{counts[name]:8d}  {name}")
    print(f"{(time.monotonic() - began) / 60:8.1f}  minutes")
    return int(bool(counts["tracebacks"] or counts["wrong results"]))


if __name__ == "__main__":
    sys.exit(main())
