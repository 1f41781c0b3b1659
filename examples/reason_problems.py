"""The problems of reason.py, and what is trained on: files of rows, each written once.

    write(out, args, numbers) -> OUT/problems/round-1.jsonl, ..., validation/NAME.jsonl, test/NAME.jsonl of a FILE
    choose(folder, most) -> FOLDER/pairs.jsonl, right.jsonl       of what make_prefs.py has sampled, at most `most` rows

Problems to sample and validation are of a training split: GSM8K's own, 12,000 of MATH without MATH-500, or generated
ones. No test item is among them. A FILE is divided by --seed.
"""

import functools
import json
import random
from pathlib import Path
from statistics import median

import jsonlines

from files import InputError, replacing
from reasoning import answers, benchmarks, problems, protocols, tasks

TEMPLATE = 20  # tokens that a chat template adds to a prompt: a planning number
PER_PROMPT = 4  # pairs, and right responses, of one prompt at most
MATH = benchmarks.Benchmark(
    files=("math/train.jsonl",),
    hub=("nlile/hendrycks-MATH-benchmark", None, "train"),
    ask=benchmarks.ask_math,
    kind="expression",
)
TRAINING = {"gsm8k": protocols.TRAINING, "math": MATH}
SIZES = {"gsm8k": (7473, 1319), "math": (12000, 500)}  # (training split, test items)
GENERATED = (6000, 1000)  # that are drawn at most
BENCHMARKS = {"gsm8k": "gsm8k", "math": "math500"}  # evaluate.py's names of the tests


def check_task(task, test_file=None):
    """Refuse a --task that is neither a name nor a file, and a --test_file without a file of training problems."""
    names = [*TRAINING, *tasks.FAMILIES]
    if task not in names and not Path(task).is_file():
        raise InputError(f"--task {task}: neither a task nor a file; there are {', '.join(names)}")
    if test_file and task in names:
        raise InputError(f"--test_file {test_file}: {task} has its own test items; it is for --task FILE")


def available(args):
    """(problems of the training split, test items) of --task."""
    if args.task in tasks.FAMILIES:
        return GENERATED
    if args.task in SIZES:
        return SIZES[args.task]
    return tuple(map(len, own_rows(args.task, args.test_file, args.seed)))


@functools.cache
def own_rows(path, test_file, seed):
    """(training rows, test rows) of a FILE in an order by the seed. No prompt is there twice, nor in both."""
    found = rows_by_text(path)
    test = rows_by_text(test_file) if test_file else {}
    rows = [row for text, row in found.items() if text not in test]
    random.Random(seed).shuffle(rows)
    if test_file:
        return rows, list(test.values())
    return rows[len(rows) // 4 :], rows[: len(rows) // 4]


def rows_by_text(path):
    """{text of the prompt: row} of a file of problems."""
    return {each.text: {"prompt": each.prompt, "answer": each.answer} for each in problems.read(path)}


def prompt_tokens(args):
    """(tokens of a prompt on average, of the longest one) of a FILE, at four characters a token; else None."""
    if args.task in (*TRAINING, *tasks.FAMILIES):
        return None
    rows = sum(own_rows(args.task, args.test_file, args.seed), [])
    lengths = [len(json.dumps(row["prompt"])) / 4 + TEMPLATE for row in rows]
    return round(sum(lengths) / len(lengths)), round(max(lengths))


def training_rows(args, count):
    """`count` rows {"prompt", "answer"} of the training split, in an order by --seed."""
    if args.task in tasks.FAMILIES:
        drawn = tasks.generate(count, "train", args.seed, (args.task,))
        return [{"prompt": each.prompt, "answer": each.answer} for each in drawn]
    place, rows = benchmarks.rows_of(f"{args.task}'s training set", TRAINING[args.task], args.data_dir)
    asked = [TRAINING[args.task].ask(row) for row in rows]
    found = {each.prompt: {"prompt": each.prompt, "answer": each.answer} for each in asked if answers.gold(each.answer)}
    rows = list(found.values())
    if len(rows) < count:
        raise InputError(f"{place}: holds {len(rows)} problems, the plan takes {count}; give fewer --problems")
    random.Random(args.seed).shuffle(rows)
    return rows[:count]


def name_of(task):
    """A task's name in file names and in evaluate.py's tables."""
    return Path(task).stem if Path(task).is_file() else task


def write(out, args, numbers):
    """Write the problems of all rounds, and the validation slice. Rounds share problems where there are too few."""
    folder, name = out / "problems", name_of(args.task)
    in_training, _ = available(args)
    per_round = numbers.problems
    if args.task in (*TRAINING, *tasks.FAMILIES):
        rows = training_rows(args, min(in_training, numbers.validation + args.rounds * per_round))
    else:
        rows, test = own_rows(args.task, args.test_file, args.seed)
        write_rows(folder / "test" / f"{name}.jsonl", test[: numbers.test])
    write_rows(folder / "validation" / f"{name}.jsonl", rows[: numbers.validation])
    rows = rows[numbers.validation :]
    for number in range(args.rounds):
        places = [place % len(rows) for place in range(number * per_round, (number + 1) * per_round)]
        write_rows(folder / f"round-{number + 1}.jsonl", [rows[place] for place in places])


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        jsonlines.Writer(file).write_all(rows)


def read_rows(path):
    with jsonlines.open(path) as file:
        return list(file)


# --- what is trained on -----------------------------------------------------------------------------------


def choose(folder, source, most):
    """Write pairs.jsonl and right.jsonl of a round, and return what there is to say of them, for the report.

    folder: with prefs.jsonl of make_prefs.py. source: the file of its problems. most: rows of each file.
    """
    prompts = [row["prompt"] for row in read_rows(source)]
    _, *lines = read_rows(folder / "prefs.jsonl.samples.jsonl")
    lines.sort(key=place_of)
    right = {}
    for line in lines:
        if line["correct"] is True and line["ended"] and line["text"].strip():
            texts = right.setdefault(line["number"], [])
            if line["text"] not in texts and len(texts) < PER_PROMPT:
                texts.append(line["text"])
    rows = [[{"prompt": prompts[number], "response": text} for text in texts] for number, texts in right.items()]
    pairs = {}
    for row in read_rows(folder / "prefs.jsonl"):
        pairs.setdefault(json.dumps(row["prompt"]), []).append(row)
    chosen, demonstrations = in_turns(pairs.values(), most), in_turns(rows, most)
    write_rows(folder / "pairs.jsonl", chosen)
    write_rows(folder / "right.jsonl", demonstrations)
    return {
        "problems": len(prompts),
        "responses": len(lines),
        "right": sum(line["correct"] is True for line in lines),
        "without a readable answer": sum(line["correct"] is None for line in lines),
        "ended": sum(line["ended"] for line in lines),
        "problems with right and wrong responses": len(pairs),
        "pairs": len(chosen),
        "chosen, characters (median)": median(len(row["chosen"]) for row in chosen),
        "rejected, characters (median)": median(len(row["rejected"]) for row in chosen),
        "right responses for SFT": len(demonstrations),
    }


def place_of(line):
    return line["number"], line["sample"]


def in_turns(groups, most):
    """At most `most` rows: the first of each group, then the second of each, and so on."""
    groups = [list(group) for group in groups]
    longest = max(map(len, groups), default=0)
    turns = [group[turn] for turn in range(longest) for group in groups if turn < len(group)]
    return turns[:most]
