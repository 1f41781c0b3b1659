"""GSM8K, MATH-500, LogiQA 2.0 and HotpotQA: reading, prompts, answer extractors, and their checks.

    items = read("gsm8k", "data")     a file in its original format under data/; without a folder, the Hub's data set
    grade("gsm8k", items[0].answer, "16 - 3 - 4 = 9, 9 * 2 = 18\\n#### 18") -> {"extracted": "18", "correct": True}

evaluate.py measures with these extractors: gsm8k_answer, boxed, letter and short_answer, one per benchmark. There are
two others: tasks.extract_answer, which is strict, verifies the embedded tasks and what make_prefs.py samples; the tasks
of lm_eval (harness.py) bring their own. All four benchmarks are asked without examples (zero-shot), in one user message
where the model has a chat template. The prompts say how to mark the answer; the extractors read what models write.
"""

import json
import logging
import re
import string
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

from files import InputError
from models.folders import downloading
from reasoning.tasks import without_thoughts


class Item(NamedTuple):
    id: str  # its place in the file or data set, from 1
    question: str  # what identifies it: looked for in training prompts
    prompt: str  # what the model is asked
    answer: str  # gold


class Asked(NamedTuple):
    """An Item without its id."""

    question: str
    prompt: str
    answer: str


class Benchmark(NamedTuple):
    files: tuple  # names under --data_dir, the first that is there; * stands for anything
    hub: tuple  # data set, configuration, split
    ask: Callable  # row -> Asked; KeyError, TypeError or ValueError if it is not of this benchmark
    extract: Callable  # response -> the answer's text, or None
    correct: Callable  # (extracted, gold) -> bool


# --- GSM8K (Cobbe et al., arXiv 2110.14168): a number ---

NUMBER = re.compile(
    r"(?<![A-Za-z\d./])(?:(?<!\))-)?(?:\$-?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?"
)


def ask_gsm8k(row):
    answer = gsm8k_answer(row["answer"])
    if answer is None:
        raise ValueError("its answer ends in no number after ####")
    prompt = f"Question: {row['question']}\nSolve it step by step. End with #### and the number alone.\nAnswer:"
    return Asked(row["question"], prompt, answer)


def plain_number(text):
    """One spelling for one number: "$1,200.50" -> "1200.5", "-0" -> "0", "007" -> "7"; "1/2" stays a fraction."""
    whole, _, fraction = re.sub(r"[$,]", "", text).lstrip("-").partition(".")
    number = ".".join(part for part in (whole.lstrip("0") or "0", fraction.rstrip("0")) if part)
    return f"-{number}" if "-" in text and number != "0" else number


def gsm8k_answer(text):
    """The number that answers, or None. It is looked for, in this order,

    in the last \\boxed{} after the last ####; after that ####; without one, in the last box; at the end of the text.
    "#### 5 + 3": None, a sum is no answer. Commas, $, units and a final full stop do not count:
    "$1,200.0 a day." -> "1200".
    """
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\$", "$").replace("**", "")
    text = re.sub(r"(\d):00\b", r"\1", text)  # 2:00 pm is 2
    if re.search(r"####[ \t]*\$?-?[\d.,]*\d", text):
        text = re.sub(r"(?:\s*####\s*)+\Z", "", text)  # cut off where it begins to repeat itself
    _, mark, tail = text.rpartition("####")
    inside = boxed(tail) if mark else boxed(text)
    if mark and inside is None:
        return lone_number(tail.strip().partition("\n")[0])
    if inside is not None:
        inside = inside.rpartition("=")[2]
        if "frac" in inside:
            return None
    found = NUMBER.findall(text if inside is None else inside)
    return plain_number(found[-1]) if found else None


def lone_number(line):
    """The first number of a line; None where a calculation goes on from it, as in 5 + 3."""
    found = NUMBER.search(line)
    if not found or re.match(r"\s*[-+*/^=]\s*[$(\\]?\d", line[found.end() :]):
        return None
    return plain_number(found[0])


# --- MATH (Hendrycks et al., arXiv 2103.03874; the 500 of Lightman et al., arXiv 2305.20050): a \boxed{expression} ---


def ask_math(row):
    prompt = f"Problem: {row['problem']}\nSolve it step by step. Put the final answer in \\boxed{{}}.\nSolution:"
    return Asked(row["problem"], prompt, str(row["answer"]))


def boxed(text):
    """What the last \\boxed{...} or \\fbox{...} holds, braces balanced; None if there is none or it is cut off."""
    starts = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))
    if not starts:
        bare = re.findall(r"\\boxed\s+([^\s$.]+)", text)  # "\boxed 2" is TeX, too
        return bare[-1] if bare else None
    start, depth = starts[-1].end(), 1
    for mark in re.finditer(r"\\.|[{}]", text[start:], re.S):  # \{ is no brace
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return text[start : start + mark.start()].strip()
    return None


def same_expression(extracted, gold):
    """Equal as text but for spaces, or equal in mathematics, which math-verify decides."""
    if re.sub(r"\s", "", extracted) == re.sub(r"\s", "", gold):
        return True
    math_verify = import_math_verify()
    return math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(f"${extracted}$"))


def import_math_verify():
    try:
        import math_verify
    except ImportError:
        raise InputError(
            "math500: its answers are compared by math-verify, which is not installed; run: "
            "pip install -r requirements-eval.txt"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it cannot compare, at length
    return math_verify


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


BARE = r"(?<![A-Za-z'])([A-D])(?![A-Za-z'])"  # a letter that is no word's
LETTER = rf"\(?{BARE}(?:\)|(?=\s*(?:[.,:;!]|\n|\Z))|(?=\s+(?:because|since|as|is|or|and)\b)|(?=\s+[-–—]\s))"
SEVERAL = re.compile(r"\s*(?:,|,?\s*(?:or|and)\b)\s*\(?" + BARE + r"(?!\)?\s+is\b)")  # "A or B", "A, B": no answer
MARKUP = re.compile(r"\\(?:boxed|text\w*|mathrm|mathbf)\s*\{|\\[()\[\]]|</?answer>|[{}$*_`\"“”‘’\[\]]|'(?=[A-D]'|\W)")
OPTION = re.compile(r"(?i:option\s+|choice\s+)?" + LETTER)
ANSWER_IS = re.compile(r"(?i:answer\s*(?:is|:)[\s:]*(?:either\s+)?(?:option\s+|choice\s+)?)" + LETTER)
FIRST_LETTER = re.compile(r"\A\W*([A-D])\b")
IS_RIGHT = re.compile(
    rf"(?:(?i:\b(?:option|choice)\s+(?:is\s+)?)\(?{BARE}\)?|\(?{BARE}\)?)"
    r"\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
)


def letter(text):
    """A to D, or None. It is looked for, in this order,

    after the last "answer is" or "answer:"; in the last \\boxed{}; where an option is said to be right; at the end of
    the last line; at the beginning, if no other line begins with an option.
    "A teacher" has an article, no letter, and "A or B" is no answer.
    """
    plain = MARKUP.sub("", text).strip()
    inside = (boxed(text) or "").replace("\\text{", "")
    for pattern, where in ((ANSWER_IS, plain), (FIRST_LETTER, inside), (IS_RIGHT, plain)):
        if said := list(pattern.finditer(where)):
            last = said[-1]
            return None if SEVERAL.match(where[last.end() :]) else next(filter(None, last.groups()))
    return letter_by_place([line.strip() for line in plain.split("\n") if line.strip()])


def letter_by_place(lines):
    """The letter at the end of the last of `lines`, or at the beginning of the first."""
    if not lines:
        return None
    ending = set(re.findall(r"\(([A-D])\)", lines[-1])) or set(re.findall(BARE + r"[.!)]?\Z", lines[-1]))
    beginning = [match[1] for match in map(OPTION.match, lines) if match]
    if len(ending) == 1 and (len(lines) > 1 or not beginning):
        return ending.pop()
    return beginning[0] if len(beginning) == 1 and OPTION.match(lines[0]) else None


# --- HotpotQA (Yang et al., arXiv 1809.09600): a few words; exact match and F1 as in its hotpot_evaluate_v1.py ---


def ask_hotpotqa(row):
    paragraphs = row.get("context") or []
    if isinstance(paragraphs, dict):  # the Hub's form: columns
        paragraphs = zip(paragraphs["title"], paragraphs["sentences"])
    context = "".join(f"{title}: {''.join(sentences)}\n\n" for title, sentences in paragraphs)
    question = row["question"]
    prompt = f"{context}Question: {question}\nGive the answer alone, in as few words as possible.\nAnswer:"
    return Asked(question, prompt, row["answer"])


def short_answer(text):
    """What follows the last "answer is" or "answer:", else the first line that is not blank; None if all are."""
    text = re.sub(r"[*`]|</?answer>|\\boxed\{([^{}]*)\}", lambda match: match[1] or "", text)
    said = re.findall(r"(?i)answer\s*(?:is\b|:)[\s:]*(\S.*)", text) or re.findall(r"\S.*", text)[:1]
    return said[-1].strip() if said else None


def plain_words(text):
    """Lower case, without punctuation, articles and runs of spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(extracted, gold):
    return plain_words(extracted) == plain_words(gold)


def f1(extracted, gold):
    """F1 of the words that both share; 0 where one says yes, no or noanswer and the other something else."""
    ours, theirs = plain_words(extracted), plain_words(gold)
    if ours != theirs and any(" ".join(side) in ("yes", "no", "noanswer") for side in (ours, theirs)):
        return 0.0
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


# --- reading and grading ---

NEXT = re.compile(r"\n\s*\n\s*(?:Question|Problem|Q): ?\S")  # a model that runs on, into a question of its own

BENCHMARKS = {
    "gsm8k": Benchmark(
        files=("gsm8k/test.jsonl", "test.jsonl"),
        hub=("openai/gsm8k", "main", "test"),
        ask=ask_gsm8k,
        extract=gsm8k_answer,
        correct=str.__eq__,
    ),
    "math500": Benchmark(
        files=("math500/test.jsonl", "MATH-500/test.jsonl", "math/math500*.jsonl", "math500*.jsonl", "test.jsonl"),
        hub=("HuggingFaceH4/MATH-500", None, "test"),
        ask=ask_math,
        extract=boxed,
        correct=same_expression,
    ),
    "logiqa": Benchmark(
        files=("logiqa/test.txt", "logiqa/LogiQA2_test*.jsonl", "LogiQA2_test*.jsonl", "test.txt", "test.jsonl"),
        hub=("baber/logiqa2", "logiqa2", "test"),
        ask=ask_logiqa,
        extract=letter,
        correct=str.__eq__,
    ),
    "hotpotqa": Benchmark(
        files=("hotpotqa/hotpot_dev_*.json", "hotpot_dev_*.json"),
        hub=("hotpotqa/hotpot_qa", "distractor", "validation"),
        ask=ask_hotpotqa,
        extract=short_answer,
        correct=exact_match,
    ),
}


def read(name, data_dir=None):
    """The Items of a benchmark, in order, from its file under `data_dir` or from the Hub."""
    place, rows = local_rows(name, Path(data_dir)) if data_dir else hub_rows(name)
    items = []
    for number, row in enumerate(rows, 1):
        try:
            asked = BENCHMARKS[name].ask(row)
            if not all(isinstance(text, str) and text.encode() and text.strip() for text in asked):
                raise ValueError("expected texts that are not empty")
            items.append(Item(str(number), *asked))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{place}: row {number} is not one of {name} ({said})") from None
    if not items:
        raise InputError(f"{place}: holds no row")
    return items


def local_rows(name, folder):
    """(path, rows) of the benchmark's file: JSON lines, or one list."""
    wanted = BENCHMARKS[name].files
    found = next(filter(None, (sorted(folder.glob(file)) for file in wanted)), None)
    if not found:
        raise InputError(f"--data_dir {folder}: holds no file of {name}; looked for {', '.join(wanted)}")
    if len(found) > 1:
        raise InputError(
            f"--data_dir {folder}: several files of {name} ({', '.join(path.name for path in found)}); leave one there"
        )
    try:
        text = found[0].read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return found[0], json.loads(text)
        return found[0], [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{found[0]}: expected JSON, one object a line or one list ({error})") from None


def hub_rows(name):
    """(data set, rows) of the benchmark on the Hub."""
    path, configuration, split = BENCHMARKS[name].hub
    with downloading(
        f"{name}: its data set {path} could not be downloaded from the Hub, and --data_dir names no folder of its files"
    ):
        import datasets

        return path, datasets.load_dataset(path, configuration, split=split)


def grade(name, answer, response):
    """{"extracted", "correct"} of a response to an Item of `name` with the gold `answer`; HotpotQA's has "f1", too."""
    extract, response = BENCHMARKS[name].extract, without_thoughts(response)
    extracted = extract(NEXT.split(response)[0])
    extracted = extract(response) if extracted is None else extracted  # the question itself, said again
    graded = {
        "extracted": extracted,
        "correct": extracted is not None and bool(BENCHMARKS[name].correct(extracted, answer)),
    }
    if name == "hotpotqa":
        graded["f1"] = f1(extracted or "", answer)
    return graded
