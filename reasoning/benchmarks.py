"""GSM8K, MATH-500, LogiQA 2.0, HotpotQA, Countdown and Sudoku: reading their files, and their prompts.

    items = read("gsm8k", "data")     a file in its original format under data/; without a folder, the Hub's data set
    answers.grade(items[0].kind, items[0].answer, "9 * 2 = 18\\n#### 18") -> {"extracted": "18", "correct": True}

All are asked without examples (zero-shot), in one user message where the model has a chat template. The prompts
say how to mark the answer; answers.py reads what models write.
"""

import csv
import json
import re
from pathlib import Path
from typing import Callable, NamedTuple

from files import InputError
from models.folders import downloading
from reasoning import answers, countdown, sudoku


class Item(NamedTuple):
    id: str  # its place in the file or data set, from 1
    question: str  # what identifies it: looked for in training prompts
    prompt: str | list  # what the model is asked, a text or messages
    answer: str  # gold
    kind: str  # of answer, a name in answers.KINDS
    groups: dict = {}  # {a name of GROUPS: its value}, by which accuracies are given, too


class Asked(NamedTuple):
    """An Item without its id and kind."""

    question: str
    prompt: str
    answer: str
    groups: dict = {}


GROUPS = ("level", "subject")  # of MATH


class Benchmark(NamedTuple):
    files: tuple  # names under --data_dir, the first that is there; * stands for anything
    hub: tuple | None  # data set, configuration, split; None: it is in files only
    ask: Callable  # row -> Asked; KeyError, TypeError or ValueError if it is not of this benchmark
    kind: str  # of answers, a name in answers.KINDS


# --- GSM8K (Cobbe et al., arXiv 2110.14168): a number ---


def ask_gsm8k(row):
    answer = answers.read("number", row["answer"])
    if answer is None:
        raise ValueError("its answer ends in no number after ####")
    prompt = f"Question: {row['question']}\nSolve it step by step. End with #### and the number alone.\nAnswer:"
    return Asked(row["question"], prompt, answer)


# --- MATH (Hendrycks et al., arXiv 2103.03874; the 500 of Lightman et al., arXiv 2305.20050): a \boxed{expression} ---


def ask_math(row):
    prompt = f"Problem: {row['problem']}\nSolve it step by step. Put the final answer in \\boxed{{}}.\nSolution:"
    groups = {name: row[name] for name in GROUPS if name in row}
    return Asked(row["problem"], prompt, str(row["answer"]), groups)


# --- LogiQA 2.0 (Liu et al., 2023): one letter of four ---


def ask_logiqa(row):
    if not isinstance(row["options"], list) or row["answer"] not in range(4):
        raise ValueError("expected four options and an answer of 0 to 3")
    options = "\n".join(f"{name}. {option}" for name, option in zip("ABCD", row["options"], strict=True))
    prompt = (
        f"{row['text']}\n\nQuestion: {row['question']}\n{options}\n"
        'Think step by step. End with "The answer is" and the letter.\nAnswer:'
    )
    return Asked(row["text"], prompt, "ABCD"[row["answer"]])


# --- HotpotQA (Yang et al., arXiv 1809.09600): a few words ---


def ask_hotpotqa(row):
    paragraphs = row.get("context") or []
    if isinstance(paragraphs, dict):  # the Hub's form: columns
        paragraphs = zip(paragraphs["title"], paragraphs["sentences"])
    context = "".join(f"{title}: {''.join(sentences)}\n\n" for title, sentences in paragraphs)
    question = row["question"]
    prompt = f"{context}Question: {question}\nGive the answer alone, in as few words as possible.\nAnswer:"
    return Asked(question, prompt, row["answer"])


# --- Countdown of three numbers and 4x4 Sudoku (Zhao et al., arXiv 2504.12216): files and prompts of d1 ---


def ask_countdown(row):
    numbers = [int(number) for number in row["input"].split(",")]
    return Asked(*countdown.ask(numbers, int(row["output"])))


def ask_sudoku(row):
    if not re.fullmatch("[0-4]{16}", row["Puzzle"]) or row["Solution"] not in sudoku.solutions(row["Puzzle"]):
        raise ValueError("expected a puzzle of 16 digits, 0 to 4, and its solution")
    return Asked(*sudoku.ask(row["Puzzle"], row["Solution"]))


# --- reading ---

BENCHMARKS = {
    "gsm8k": Benchmark(
        files=("gsm8k/test.jsonl", "test.jsonl"), hub=("openai/gsm8k", "main", "test"), ask=ask_gsm8k, kind="number"
    ),
    "math500": Benchmark(
        files=("math500/test.jsonl", "MATH-500/test.jsonl", "math/math500*.jsonl", "math500*.jsonl", "test.jsonl"),
        hub=("HuggingFaceH4/MATH-500", None, "test"),
        ask=ask_math,
        kind="expression",
    ),
    "logiqa": Benchmark(
        files=("logiqa/test.txt", "logiqa/LogiQA2_test*.jsonl", "LogiQA2_test*.jsonl", "test.txt", "test.jsonl"),
        hub=("baber/logiqa2", "logiqa2", "test"),
        ask=ask_logiqa,
        kind="letter",
    ),
    "hotpotqa": Benchmark(
        files=("hotpotqa/hotpot_dev_*.json", "hotpot_dev_*.json"),
        hub=("hotpotqa/hotpot_qa", "distractor", "validation"),
        ask=ask_hotpotqa,
        kind="text",
    ),
    "countdown": Benchmark(
        files=("countdown/countdown_cd3_test.jsonl", "countdown_cd3_test.jsonl"),
        hub=None,
        ask=ask_countdown,
        kind="countdown",
    ),
    "sudoku": Benchmark(
        files=("sudoku/4x4_test_sudoku.csv", "4x4_test_sudoku.csv"), hub=None, ask=ask_sudoku, kind="sudoku"
    ),
}


def read(name, data_dir=None, prompt=None):
    """The Items of a benchmark, in order, from its file under `data_dir` or from the Hub (if it has a hub).

    prompt: makes another prompt than the benchmark's own of a row, as a protocol does.
    """
    benchmark = BENCHMARKS[name]
    place, rows = rows_of(name, benchmark, data_dir)
    items = []
    for number, row in enumerate(rows, 1):
        try:
            asked = benchmark.ask(row)
            if not all(isinstance(text, str) and text.encode() and text.strip() for text in asked[:3]):
                raise ValueError("expected texts that are not empty")
            if prompt:
                asked = asked._replace(prompt=prompt(row))
            items.append(Item(str(number), *asked[:3], benchmark.kind, asked.groups))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{place}: row {number} is not one of {name} ({said})") from None
    if not items:
        raise InputError(f"{place}: holds no row")
    return items


def rows_of(name, benchmark, data_dir=None):
    """(file or data set, rows) of a Benchmark, from its file under `data_dir` or from the Hub. name: for messages."""
    return local_rows(name, benchmark.files, Path(data_dir)) if data_dir else hub_rows(name, benchmark.hub)


def local_rows(name, wanted, folder):
    """(path, rows) of the first of the `wanted` files that is there: JSON lines, one list, or CSV."""
    found = next(filter(None, (sorted(folder.glob(file)) for file in wanted)), None)
    if not found:
        raise InputError(f"--data_dir {folder}: holds no file of {name}; looked for {', '.join(wanted)}")
    if len(found) > 1:
        raise InputError(
            f"--data_dir {folder}: several files of {name} ({', '.join(path.name for path in found)}); leave one there"
        )
    try:
        text = found[0].read_text(encoding="utf-8-sig")
        if found[0].suffix == ".csv":
            return found[0], list(csv.DictReader(text.splitlines()))
        if text.lstrip().startswith("["):
            return found[0], json.loads(text)
        return found[0], [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{found[0]}: expected JSON, one object a line or one list ({error})") from None


def hub_rows(name, hub):
    """(data set, rows) of a data set on the Hub."""
    path, configuration, split = hub
    with downloading(
        f"{name}: its data set {path} could not be downloaded from the Hub, and --data_dir names no folder of its files"
    ):
        import datasets

        return path, datasets.load_dataset(path, configuration, split=split)
