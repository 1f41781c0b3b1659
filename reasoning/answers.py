r"""The one reader of what models write: the answer that a response gives, and whether it is the right one.

    grade("number", "18", "9 * 2 = 18\n#### $18 a day")   {"extracted": "18", "correct": True}
    grade("number", "18", r"So it is \boxed{20}.")        {"extracted": "20", "correct": False}
    grade("number", "18", "#### 18 or 20")                {"extracted": None, "correct": None}: neither right nor wrong
    gold("9 * 2 = 18\n#### 18")                           Gold("number", "18")

make_prefs.py chooses pairs with it; evaluate.py and generate.py measure with it. An answer is looked for in this order:
in the last box after the last ####, after the last ####, in the last \boxed{}, in <answer>; where none is marked, after
"the answer is" or at the end, as its kind allows. Thoughts are no answer. Where a model runs on into a question of its
own, its first answer counts.
"""

import logging
import re
import string
from collections import Counter
from typing import Callable, NamedTuple

from files import InputError
from reasoning import countdown, letters, numerals, sudoku
from reasoning.marks import EMPHASIS, is_marked, lone_line, marked_places, problems, said_places, without_thoughts


class Kind(NamedTuple):
    """How the answers of one kind are read and compared."""

    parse: Callable  # text of a marked place -> answer; None: there is none; UNCLEAR: there is no single one
    unmarked: Callable  # a response in which no place has an answer -> the same
    same: Callable  # (answer, gold) -> True or False; None: it cannot be said
    shares: dict = {}  # name: (answer or "", gold) -> how much of it is right, 0 to 1


class Gold(NamedTuple):
    """The right answer of a problem."""

    kind: str  # a name in KINDS
    text: str


def read(kind, response):
    """The answer of a response as text, None if none can be read. kind: a name in KINDS."""
    parse, unmarked, *_ = KINDS[kind]
    for text in problems(EMPHASIS.sub("", without_thoughts(response))):
        found = (parse(place) for place in marked_places(text))
        answer = next((each for each in found if each is not None), None)
        if answer is None:
            answer = unmarked(text)
        if answer is not None:
            return answer or None
    return None


def grade(kind, right, response):
    """{"extracted", "correct"} of a response: None and None where no answer can be read. right: the gold answer.

    The kind text (HotpotQA's) has "f1", too; sudoku has "cells".
    """
    extracted = read(kind, response)
    graded = {"extracted": extracted, "correct": None if extracted is None else KINDS[kind].same(extracted, right)}
    for name, share in KINDS[kind].shares.items():
        graded[name] = share(extracted or "", right)
    return graded


def gold(text):
    """The Gold of the right answer as people write it: "8", "(B)", a solution that ends in #### 8 or holds \\boxed{8}.

    Of Countdown and Sudoku it is the problem, which may have several right answers: countdown.GOLD, sudoku.GOLD.
    None if it is nothing that can be verified: several sentences, or nothing.
    """
    said = [each.rstrip(".") for _, each in said_places(text)]
    final = next(filter(None, (*marked_places(text), *said)), text.strip())
    final = WRAPPED.sub(r"\1", final).strip()
    if not re.search(r"\w", final) or "\n" in final or len(final) > LONGEST:
        return None
    for kind, module in (("countdown", countdown), ("sudoku", sudoku)):
        if module.GOLD.fullmatch(final):
            return Gold(kind, final)
    if found := LETTER.fullmatch(final):
        return Gold("letter", found[1])
    if numerals.TIME.fullmatch(final.strip(".")):
        return Gold("time", numerals.time_of_day(final))
    if found := VERDICT.fullmatch(final):
        return Gold("words", found[1])
    number = numerals.number(final)
    if number and numerals.is_number(final):
        return Gold("number", number)
    if re.search(r"[^\W\d_]{2}", final) and not re.search(r"[\\^{}=<>+]", final):
        return Gold("words", final) if len(final.split()) <= MOST_WORDS else None
    return Gold("expression", expression(final))


WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf)\w*\s*\{([^{}\\]*)\}")
LETTER = re.compile(r"\W*([A-HJ])(?:\W*|[).:]\s.*)")  # "(B)", "B. Paris"
LONGEST = 200  # characters of a gold answer
MOST_WORDS = 10
YES_OR_NO = {"yes": True, "true": True, "no": False, "false": False}
VERDICT = re.compile(r"(?i)(yes|no|true|false)[,;:.!]\s.*")  # "No, she is not."


# --- words: the names and colours of the embedded tasks, yes and no --------------------------------------


def words(text):
    """The text of a marked place without markup; None if it has no word."""
    text = WRAPPED.sub(r"\1", text).strip(" \t*_`")
    return text if re.search(r"\w", text) else None


def lone_words(text):
    """What follows the last "the answer is", else the line that is all there is."""
    said = [each for _, each in said_places(text)]
    return words(said[0] if said else lone_line(text) or "")


def short_answer(text):
    """What follows the last "the answer is", else the first line that is not blank."""
    said = [each for _, each in said_places(text)] or [line for line in text.split("\n") if line.strip()]
    return words(said[0]) if said else None


def plain_words(text):
    """Lower case, without punctuation, articles and runs of spaces; as HotpotQA's hotpot_evaluate_v1.py."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer, right):
    return plain_words(answer) == plain_words(right)


def f1(answer, right):
    """F1 of the words that both share; 0 where one says yes, no or noanswer and the other something else."""
    ours, theirs = plain_words(answer), plain_words(right)
    if ours != theirs and any(" ".join(side) in ("yes", "no", "noanswer") for side in (ours, theirs)):
        return 0.0
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def same_words(answer, right):
    """An exact match; None where the right words stand among others, as in "Mia is the oldest".

    Of yes and no, the first word counts: "No, she is not."; "it depends" and "yes and no" are neither.
    """
    ours, theirs = plain_words(answer), plain_words(right)
    if ours == theirs:
        return True
    if len(theirs) == 1 and theirs[0] in YES_OR_NO:
        said = [YES_OR_NO.get(word) for word in ours] or [None]
        is_both = re.match(r"\w+ (?:and|or) (?:yes|no|true|false)\b", " ".join(ours))
        return None if said[0] is None or is_both else said[0] == YES_OR_NO[theirs[0]]
    return None if set(theirs) <= set(ours) else False


# --- expressions, compared by math-verify -----------------------------------------------------------------


def expression(text):
    """The TeX of a marked place, a number without its unit; None if it is empty."""
    if "%" not in text and numerals.is_number(text) and (number := numerals.number(text)):
        return number
    text = re.sub(r"\A(?:\\\(|\\\[|\$+)|(?:\\\)|\\\]|\$+)\.?\Z", "", text.strip().translate(numerals.CHARACTERS))
    text = re.sub(numerals.THOUSANDS, "", re.sub(r"\\\$|\\!", "", text))
    return text.strip() or None


def expression_in_prose(text):
    """What follows the last "the answer is", or a line without words that is all there is."""
    if is_marked(text):
        return None
    place = next((said.rstrip(".") for _, said in said_places(text)), lone_line(text) or "")
    return expression(place) if not re.search(r"(?<!\\)\b[A-Za-z]{3,}", place) else None


def same_expression(answer, right):
    """Equal as text but for spaces, or in mathematics, as math-verify says; None if `answer` is no mathematics."""
    right = expression(right)
    if re.sub(r"\s", "", answer) == re.sub(r"\s", "", right):
        return True
    math_verify = import_math_verify()
    ours, theirs = (math_verify.parse(f"${text}$") for text in (answer, right))
    is_text, right_is_text = (all(isinstance(each, str) for each in found) for found in (ours, theirs))
    return None if is_text and not right_is_text else math_verify.verify(theirs, ours)


def import_math_verify():
    try:
        import math_verify
    except ImportError:
        raise InputError(
            r"answers such as \frac{1}{2} are compared by math-verify, which is not installed; run: "
            "pip install -r requirements-eval.txt"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it cannot compare, at length
    return math_verify


# The kinds of answers. text: HotpotQA's, judged as its authors do.
KINDS = {
    "number": Kind(numerals.number, numerals.number_in_prose, numerals.same_number),
    "time": Kind(numerals.time_of_day, numerals.time_in_prose, numerals.same_time),
    "letter": Kind(letters.letter, letters.letter_in_prose, str.__eq__),
    "words": Kind(words, lone_words, same_words),
    "expression": Kind(expression, expression_in_prose, same_expression),
    "text": Kind(words, short_answer, exact_match, {"f1": f1}),
    "countdown": Kind(countdown.expression, countdown.in_prose, countdown.same),
    "sudoku": Kind(sudoku.grid, sudoku.in_prose, sudoku.same, {"cells": sudoku.cells}),
}
