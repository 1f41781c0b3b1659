"""data_prep.py against TRL's DPO tokenization of the same file: rows per second, and whether the ids agree.

    pip install trl==1.16.0   (beside requirements.txt; nothing else needs it)
    python bench/prep.py [--in prefs.jsonl] [--model examples/tiny] [--num_proc 1 2] [--repeats 5] [--json FILE]

Without --in: --rows problems of reasoning/tasks.py with a planted error, always the same ones. TRL's side is its own
code, DPOTrainer._prepare_dataset on load_dataset("json"), without a trainer and without a cache. Each run is a process
of its own, and the two sides take turns. Printed for each number of worker processes, medians:

rows/s     from the file to the ids on disk. data_prep.py reads, checks, encodes, finds duplicates and packs; TRL reads,
           appends eos, encodes and drops what is too long (it truncates the rest later, in its collator).
s          of the whole process, with imports and loading the tokenizer
ratio      TRL's time over data_prep.py's, by the medians; in brackets, the least and the greatest of the turns

The rows that data_prep.py keeps are compared with TRL's up to the end token (a template may go on after it). "same
ids"; "same text": TRL encodes prompt and response as one text, and a token spans the place where they meet; "different"
makes the exit code 1. Rows that data_prep.py leaves out are not compared. TRL applies no chat template to rows of
strings, hence --template none; for rows of messages give --template chat.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jsonlines
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files  # noqa: E402
from cli import exits
from files import InputError  # noqa: E402
from models import tokenization
from preferences import packed  # noqa: E402

# --- one run, in a process of its own; each returns the seconds from the file to the ids ---


def run_ours(args, folder):
    import datasets  # noqa: F401  before the clock starts, as on TRL's side; data_prep.py imports it when it encodes

    import data_prep

    seconds = []

    def timed(function, *arguments):
        started = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - started)
        return result

    data_prep.prepare = partial(timed, data_prep.prepare)
    data_prep.write = partial(timed, data_prep.write)
    words = ["--in", args.source, "--out", str(folder / "packed"), "--model_name_or_path", args.model]
    words += ["--template", args.template, "--max_length", str(args.max_length), "--num_proc", str(args.num_proc[0])]
    data_prep.main(words)
    return sum(seconds)


def run_trl(args, folder):
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    settings = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=None if args.keep else args.max_length,  # None: no row dropped, each in its place
        dataset_num_proc=args.num_proc[0] if args.num_proc[0] > 1 else None,
    )
    trainer = DPOTrainer.__new__(DPOTrainer)  # _prepare_dataset needs no model, only this:
    trainer._tokenizer = tokenizer
    started = time.perf_counter()
    table = load_dataset("json", data_files=args.source, split="train", cache_dir=str(folder / "cache"))
    table = trainer._prepare_dataset(table, tokenizer, settings, "train")
    seconds = time.perf_counter() - started
    if args.keep:
        table.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).save_to_disk(folder / "trl")
    return seconds


def run(side, args, num_proc, folder, keep=False):
    """(seconds from the file to the ids, seconds of the whole process)"""
    command = [sys.executable, __file__, "--worker", side, "--out", folder, "--in", args.source, "--model", args.model]
    command += ["--template", args.template, "--max_length", args.max_length, "--num_proc", num_proc]
    command += ["--keep"] if keep else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    whole = time.perf_counter() - started
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise InputError(f"{side} could not tokenize {args.source} ({last})")
    return float(done.stdout.split()[-1]), whole


# --- the comparison ---


class Comparison(NamedTuple):
    counts: dict  # {how a row that data_prep.py keeps compares: number of rows}
    dropped: dict  # {why data_prep.py left rows out: number of rows}
    rows: int  # of the file


def compare(args, folder):
    """The Comparison of both sides' ids."""
    from datasets import load_from_disk

    run("data_prep", args, 1, folder)
    run("TRL", args, 1, folder, keep=True)
    ours, theirs = packed.Packed(folder / "packed"), load_from_disk(folder / "trl")
    tokenizer = tokenization.load_tokenizer(args.model)
    with open(args.source, "rb") as file:
        lines = [number for number, text in enumerate(file, 1) if text.strip()]
    assert len(lines) == len(theirs) == ours.meta["rows"]
    place, end = {line: index for index, line in enumerate(lines)}, ours.meta["end_token_id"]
    counts = dict.fromkeys(("same ids", "same text", "different"), 0)

    def texts(prompt, *sides):
        return [tokenizer.decode(prompt + side) for side in sides]

    for index, line in enumerate(ours.lines()):
        mine, row = [ids.tolist() for ids in ours[index]], theirs[place[int(line)]]
        other = [row["prompt_ids"], up_to(end, row["chosen_ids"]), up_to(end, row["rejected_ids"])]
        same = "same ids" if mine == other else "same text"
        counts[same if texts(*mine) == texts(*other) else "different"] += 1
    return Comparison(counts, ours.meta["dropped"], len(lines))


def up_to(end, ids):
    """The ids up to the first end token."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def measure(args, num_proc, rows):
    """One line of the table, as a dict; seconds are of (data_prep, TRL), turn by turn."""
    turns = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
            turns.append([run("data_prep", args, num_proc, ours), run("TRL", args, num_proc, theirs)])
    line = {"num_proc": num_proc}
    for name, times in zip(("ids", "whole"), np.moveaxis(np.array(turns), 2, 0)):  # each (repeats, 2)
        (ours, theirs), ratios = np.median(times, axis=0).tolist(), times[:, 1] / times[:, 0]
        line[name] = {
            "seconds": times.tolist(),
            "median": [ours, theirs],
            "ratio": theirs / ours,
            "least": ratios.min(),
            "most": ratios.max(),
        }
    return line | {"rows_per_second": [rows / seconds for seconds in line["ids"]["median"]]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in", dest="source", help="preferences, .jsonl, with the columns prompt, chosen, rejected")
    parser.add_argument("--rows", type=int, default=10000, help="without --in: how many to make")
    parser.add_argument(
        "--model", default=os.path.relpath(ROOT / "examples" / "tiny"), help="folder with the tokenizer"
    )
    parser.add_argument("--template", choices=("none", "chat"), default="none", help="chat: for rows of messages")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument(
        "--num_proc", type=int, nargs="+", default=[1, 2], help="numbers of worker processes, the same for both"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # these three: one run's
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print({"data_prep": run_ours, "TRL": run_trl}[args.worker](args, args.out))
        return 0
    if importlib.util.find_spec("trl") is None:
        raise InputError("TRL is not installed, and this bench measures against it; run: pip install trl==1.16.0")
    if min(*args.num_proc, args.repeats, args.rows) < 1:
        raise InputError("--num_proc, --repeats and --rows are at least 1")
    if args.json:
        files.check_out(args.json)
    with tempfile.TemporaryDirectory() as folder:
        return report(args, Path(folder))


def report(args, folder):
    """Print everything; 1 if a row's text differs, else 0."""
    named = args.source or f"{args.rows} synthetic rows"
    if not args.source:
        from reasoning import tasks

        args.source = str(folder / "prefs.jsonl")
        with jsonlines.open(args.source, "w") as writer:
            writer.write_all(tasks.preference_rows(args.rows, "train", 0, tuple(tasks.EMBEDDED)))
    counts, dropped, rows = compare(args, folder)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "datasets", "tokenizers")}
    releases = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{named}, tokenizer of {args.model}; {releases}")
    kept, left_out = listed(counts), listed(dropped) or "none"
    print(f"{rows} rows, {sum(counts.values())} kept by data_prep: {kept}; left out: {left_out}")
    print(f"{'':9}{'rows/s, from the file to the ids':>42}{'s, whole process':>42}")
    print("processes" + f"{'data_prep':>12}{'TRL':>10}{'ratio':>20}" * 2, flush=True)
    lines = []
    for num_proc in args.num_proc:
        lines.append(line := measure(args, num_proc, rows))
        ratio = {name: "{ratio:.2f} ({least:.2f}-{most:.2f})".format(**line[name]) for name in ("ids", "whole")}
        print(
            f"{num_proc:9d}{line['rows_per_second'][0]:12.0f}{line['rows_per_second'][1]:10.0f}{ratio['ids']:>20}"
            f"{line['whole']['median'][0]:12.1f}{line['whole']['median'][1]:10.1f}{ratio['whole']:>20}",
            flush=True,
        )
    if args.json:
        written = {"source": named, "model": args.model, "versions": versions, "rows": rows, **counts}
        written |= {"left_out": dropped, "max_length": args.max_length, "measured": lines}
        files.write_json(args.json, written)
    return int(counts["different"] > 0)


def listed(counts):
    return ", ".join(f"{count} {name}" for name, count in counts.items())


if __name__ == "__main__":
    exits.run(main)
