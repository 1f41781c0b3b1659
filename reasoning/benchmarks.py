"""GSM8K, MATH-500, LogiQA 2.0 and HotpotQA: reading, prompts, answers taken out of responses, and their checks.

    items = read("gsm8k", "data")     a file in its original format under data/; without a folder, the hub's data set
    grade("gsm8k", items[0].answer, "16 - 3 - 4 = 9, 9 * 2 = 18\\n#### 18") -> {"extracted": "18", "correct": True}

All four are asked without examples (zero-shot), in one user message where the model has a chat template. The prompts say
how the answer is to be marked; what a model writes instead is read by the rules of gsm8k_answer, boxed, letter, short_answer.
`Prompts` knows the prompts of a training set, and whether a benchmark's question is among them.
"""

import json
import logging
import re
import string
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

from files import InputError


class Item(NamedTuple):
    id: str  # its place in the file or data set, from 1
    question: str  # what identifies it: looked for in training prompts
    prompt: str  # what the model is asked
    answer: str  # gold


class Benchmark(NamedTuple):
    files: tuple  # names under --data_dir, the first that is there; * stands for anything
    hub: tuple  # data set, configuration, split
    ask: Callable  # row -> (question, prompt, answer); KeyError, TypeError or ValueError if it is not of this benchmark
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
    return (
        row["question"],
        (f"Question: {row['question']}\nSolve it step by step. End with #### and the number alone.\nAnswer:"),
        answer,
    )


def plain_number(text):
    """One spelling for one number: "$1,200.50" -> "1200.5", "-0" -> "0", "007" -> "7"; "1/2" stays a fraction."""
    whole, _, fraction = re.sub(r"[$,]", "", text).lstrip("-").partition(".")
    number = ".".join(part for part in (whole.lstrip("0") or "0", fraction.rstrip("0")) if part)
    return f"-{number}" if "-" in text and number != "0" else number


def gsm8k_answer(text):
    """The number in the last \\boxed{} after the last ####, else after that, else in a box, else the last; None if there is none.

    "#### 5 + 3": None, a sum is no answer. Commas, $, units and a final full stop do not count: "$1,200.0 a day." -> "1200".
    """
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\$", "$").replace("**", "")
    text = re.sub(r"(\d):00\b", r"\1", text)  # 2:00 pm is 2
    if re.search(r"####[ \t]*\$?-?[\d.,]*\d", text):
        text = re.sub(r"(?:\s*####\s*)+\Z", "", text)  # cut off where it begins to repeat itself
    _, mark, tail = text.rpartition("####")
    inside = boxed(tail) if mark else boxed(text)
    if mark and inside is None:
        line = tail.strip().partition("\n")[0]
        found = NUMBER.search(line)
        return (
            plain_number(found[0]) if found and not re.match(r"\s*[-+*/^=]\s*[$(\\]?\d", line[found.end() :]) else None
        )
    if inside is not None:
        inside = inside.rpartition("=")[2]
        if "frac" in inside:
            return None
    found = NUMBER.findall(text if inside is None else inside)
    return plain_number(found[-1]) if found else None


# --- MATH (Hendrycks et al., arXiv 2103.03874; its 500 of Lightman et al., arXiv 2305.20050): an expression in \boxed{} ---


def ask_math(row):
    return (
        row["problem"],
        (f"Problem: {row['problem']}\nSolve it step by step. Put the final answer in \\boxed{{}}.\nSolution:"),
        str(row["answer"]),
    )


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
    return (
        row["text"],
        (
            f"{row['text']}\n\nQuestion: {row['question']}\n{options}\nThink step by step. End with "
            '"The answer is" and the letter.\nAnswer:'
        ),
        "ABCD"[row["answer"]],
    )


BARE = r"(?<![A-Za-z'])([A-D])(?![A-Za-z'])"  # a letter that is no word's
LETTER = rf"\(?{BARE}(?:\)|(?=\s*(?:[.,:;!]|\n|\Z))|(?=\s+(?:because|since|as|is|or|and)\b)|(?=\s+[-–—]\s))"
SEVERAL = r"\s*(?:,|,?\s*(?:or|and)\b)\s*\(?" + BARE + r"(?!\)?\s+is\b)"  # "A or B", "A, B": no answer


def letter(text):
    """A to D: after the last "answer is" or "answer:", else in the last \\boxed{}, else where an option is said to be right, else at
    the end of the last line, else at the beginning if no other line begins with an option; None if there is none.

    "A teacher" has an article, no letter, and "A or B" is no answer.
    """
    plain = re.sub(
        r"\\(?:boxed|text\w*|mathrm|mathbf)\s*\{|\\[()\[\]]|</?answer>|[{}$*_`\"“”‘’\[\]]|'(?=[A-D]'|\W)", "", text
    ).strip()
    said = list(re.finditer(r"(?i:answer\s*(?:is|:)[\s:]*(?:either\s+)?(?:option\s+|choice\s+)?)" + LETTER, plain))
    if not said and (inside := boxed(text)):
        said = list(re.finditer(r"\A\W*([A-D])\b", inside.replace("\\text{", "")))
        plain = inside if said else plain
    said = said or list(
        re.finditer(
            rf"(?:(?i:\b(?:option|choice)\s+(?:is\s+)?)\(?{BARE}\)?|\(?{BARE}\)?)\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b",
            plain,
        )
    )
    if said:
        last = said[-1]
        return None if re.match(SEVERAL, plain[last.end() :]) else next(filter(None, last.groups()))
    lines = [line.strip() for line in plain.split("\n") if line.strip()]
    named = (
        set(re.findall(r"\(([A-D])\)", lines[-1])) or set(re.findall(BARE + r"[.!)]?\Z", lines[-1])) if lines else ()
    )
    opening = [match[1] for line in lines if (match := re.match(r"(?i:option\s+|choice\s+)?" + LETTER, line))]
    if len(named) == 1 and (len(lines) > 1 or not opening):
        return next(iter(named))
    return opening[0] if len(opening) == 1 and re.match(r"(?i:option\s+|choice\s+)?" + LETTER, lines[0]) else None


# --- HotpotQA (Yang et al., arXiv 1809.09600): a few words, exact match and F1 as its hotpot_evaluate_v1.py defines them ---


def ask_hotpotqa(row):
    context = row.get("context") or []
    if isinstance(context, dict):  # the hub's form: columns
        context = zip(context["title"], context["sentences"])
    context = "".join(f"{title}: {''.join(sentences)}\n\n" for title, sentences in context)
    return (
        row["question"],
        (f"{context}Question: {row['question']}\nGive the answer alone, in as few words as possible.\nAnswer:"),
        row["answer"],
    )


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
        ("gsm8k/test.jsonl", "test.jsonl"), ("openai/gsm8k", "main", "test"), ask_gsm8k, gsm8k_answer, str.__eq__
    ),
    "math500": Benchmark(
        ("math500/test.jsonl", "MATH-500/test.jsonl", "math/math500*.jsonl", "math500*.jsonl", "test.jsonl"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ask_math,
        boxed,
        same_expression,
    ),
    "logiqa": Benchmark(
        ("logiqa/test.txt", "logiqa/LogiQA2_test*.jsonl", "LogiQA2_test*.jsonl", "test.txt", "test.jsonl"),
        ("baber/logiqa2", "logiqa2", "test"),
        ask_logiqa,
        letter,
        str.__eq__,
    ),
    "hotpotqa": Benchmark(
        ("hotpotqa/hotpot_dev_*.json", "hotpot_dev_*.json"),
        ("hotpotqa/hotpot_qa", "distractor", "validation"),
        ask_hotpotqa,
        short_answer,
        exact_match,
    ),
}


def read(name, data_dir=None):
    """The Items of a benchmark, in order, from its file under `data_dir` or from the hub."""
    place, rows = local_rows(name, Path(data_dir)) if data_dir else hub_rows(name)
    items = []
    for number, row in enumerate(rows, 1):
        try:
            texts = BENCHMARKS[name].ask(row)
            if not all(isinstance(text, str) and text.encode() and text.strip() for text in texts):
                raise ValueError("expected texts that are not empty")
            items.append(Item(str(number), *texts))
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
        lines = [line for line in text.split("\n") if line.strip()]
        return found[0], json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{found[0]}: expected JSON, one object a line or one list ({error})") from None


def hub_rows(name):
    import datasets

    path, configuration, split = BENCHMARKS[name].hub
    try:
        return path, datasets.load_dataset(path, configuration, split=split)
    except Exception as error:  # datasets and the hub's client raise dozens of kinds; each ends here as one sentence
        raise InputError(
            f"{name}: the data set {path} is not to be had from the hub ({type(error).__name__}); "
            "give the folder of its files with --data_dir"
        ) from None


def grade(name, answer, response):
    """{"extracted", "correct"} of a response to an Item of `name` with the gold `answer`; HotpotQA's has "f1", too."""
    extract = BENCHMARKS[name].extract
    extracted = extract(NEXT.split(response)[0])
    extracted = extract(response) if extracted is None else extracted  # the question itself, said again
    graded = {
        "extracted": extracted,
        "correct": extracted is not None and bool(BENCHMARKS[name].correct(extracted, answer)),
    }
    if name == "hotpotqa":
        graded["f1"] = f1(extracted or "", answer)
    return graded


# --- which questions a training set has shown ---

WINDOW = 8  # words
SHARE = 0.75  # of a question's windows


def words(text):
    """Its words, numbers and operators in lower case; spacing, punctuation and markup around them do not count."""
    return re.findall(r"[a-z]+|[0-9]+|[^\W_]|[-+*/=<>^]", unicodedata.normalize("NFKC", text).lower())


class Prompts:
    """The prompts of a training set: does one of them hold a question, whatever stands around it?

    A question counts as seen when SHARE of its runs of WINDOW words occur in the prompts. Measured: all 917 GSM8K test
    questions of two preference sets reach 1.0 in them; the others at most 0.52, GSM8K's 7473 training questions 0.67 (the
    same story with other numbers), MATH-500, LogiQA and HotpotQA 0. A question of fewer words, or one written from a
    template (`exact`), must occur in one prompt as a whole.
    """

    def __init__(self, texts):
        split = [words(text) for text in texts]
        self.text = "\n".join(f" {' '.join(each)} " for each in split)
        self.windows = {window for each in split for window in windows(each)}

    def saw(self, question, exact=False):
        asked = words(question)
        if exact or len(asked) < WINDOW:
            return f" {' '.join(asked)} " in self.text
        runs = windows(asked)
        return len(runs & self.windows) >= SHARE * len(runs)


def windows(asked):
    """Hashes of all runs of WINDOW words: a fifth of the memory of the words themselves."""
    return {hash(tuple(asked[i : i + WINDOW])) for i in range(len(asked) - WINDOW + 1)}
