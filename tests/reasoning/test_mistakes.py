"""Tests of mistakes.py: versions written by hand; real solutions, each equation worked again by this file's own sums.

bash tests/run.sh tests/reasoning/test_mistakes.py
"""

import json
import re

import pytest

from reasoning import answers, mistakes, tasks

CLIPS = (
    "Natalia sold clips to 48 friends in April and half as many in May. How many in all?",
    "She sold 48/2 = <<48/2=24>>24 clips in May.\nTogether 48+24 = <<48+24=72>>72 clips.\n#### 72",
)


def versions(prompt, solution, kind):
    return {(place, text) for each, place, text in mistakes.errors(prompt, solution) if each == kind}


def test_annotations_go():
    assert mistakes.plain(CLIPS[1]) == "She sold 48/2 = 24 clips in May.\nTogether 48+24 = 72 clips.\n#### 72"


def test_wrong_operation():
    assert versions(*CLIPS, "wrong_operation") == {
        (0, f"She sold 48{op}2 = {c} clips in May.\nTogether 48+{c} = {48 + c} clips.\n#### {48 + c}")
        for op, c in (("+", 50), ("-", 46), ("*", 96))
    } | {
        (1, f"She sold 48/2 = 24 clips in May.\nTogether 48{op}24 = {c} clips.\n#### {c}")
        for op, c in (("-", 24), ("*", 1152), ("/", 2))
    }


def test_arithmetic_slip():
    assert (0, "She sold 48/2 = 25 clips in May.\nTogether 48+25 = 73 clips.\n#### 73") in versions(
        *CLIPS, "arithmetic_slip"
    )
    assert (1, "She sold 48/2 = 24 clips in May.\nTogether 48+24 = 62 clips.\n#### 62") in versions(
        *CLIPS, "arithmetic_slip"
    )
    assert len(versions(*CLIPS, "arithmetic_slip")) == 12


def test_wrong_number_copied():
    """Only 48 stands in the question in figures."""
    assert versions(*CLIPS, "wrong_number_copied") == {
        (0, "She sold 48/48 = 1 clips in May.\nTogether 48+1 = 49 clips.\n#### 49"),
        (1, "She sold 48/2 = 24 clips in May.\nTogether 48+48 = 96 clips.\n#### 96"),
    }


def test_dropped_step():
    """The step's first number stands where its result stood."""
    assert versions(*CLIPS, "dropped_step") == {
        (0, "Together 48+48 = 96 clips.\n#### 96"),
        (1, "She sold 48/2 = 24 clips in May.\n#### 48"),
    }


@pytest.mark.parametrize(
    "solution, text",
    [
        (
            "$1,200 * 2 = $2,400 a year\n$2,400 + .50 = $2,400.50\n#### 2,400.50",
            "$1,200 / 2 = $600 a year\n$600 + .50 = $600.50\n#### 600.50",
        ),
        (
            "7 x 3 = 21 eggs\nThe 21 eggs and 2.5: 21 - 2.5 = 18.5\n#### 18.5",
            "7 + 3 = 10 eggs\nThe 10 eggs and 2.5: 10 - 2.5 = 7.5\n#### 7.5",
        ),
        ("9 ÷ 3 = 3.00\n#### 3", None),  # the result is a number said before
        ("7 * 3 = 21\n(21 + 4) * 2 = 50\n#### 50", None),  # an expression that is not understood
        ("7 * 3 = 21\nhe wants 42 as 21 * 2 = 42\n#### 42", None),  # a later result said before
        ("7 * 3 = 21\n15 + 6 = 21\nso 21 - 1 = 20\n#### 20", None),  # which 21 is meant?
        ("5 + 7 * 3 = 26\n#### 26", None),
        ("7 * 3 = 22\n#### 22", None),
        ("it is 21\n#### 21", None),
        ("7 * 3 = 21 * 2 = 42\n#### 42", None),
    ],
)
def test_what_can_be_followed(solution, text):
    found = [each for _, place, each in mistakes.errors("", solution) if place == 0]
    assert text in found if text else not found


def test_divides_evenly_or_is_no_version():
    """7 + 3 and 7 - 3 would make the next line 10 / 3 and 4 / 3; 7 / 3 is no number one would write."""
    assert versions("", "7 * 3 = 21\nthat is 21 / 3 = 7 a day\n#### 7", "wrong_operation") == set()
    assert versions("", "7 * 3 = 21\nthat is 21 / 2 = 10.5 a day\n#### 10.5", "wrong_operation") >= {
        (0, "7 + 3 = 10\nthat is 10 / 2 = 5 a day\n#### 5"),
        (0, "7 - 3 = 4\nthat is 4 / 2 = 2 a day\n#### 2"),
    }


def test_a_number_of_the_question_is_no_result():
    """24 may be the question's 24: nothing tells which of them later lines mean."""
    prompt, solution = CLIPS
    assert all(place == 1 for _, place, _ in mistakes.errors(prompt + " There are 24 hours.", solution))


def equations(text):
    """Every "a op b = c" on its own, by eval: [(whether it is true)]."""
    number = r"\d[\d,]*(?:\.\d+)?|\.\d+"
    before, after = r"(?<![\d.,+*/×÷x=-])(?<![+*/×÷x=-] )", r"(?! *[-+*/x=×÷.\d])"
    equation = rf"{before}({number}) *([-+*/×÷x]) *\$?({number}) *= *\$?({number}){after}"
    for match in re.finditer(equation, text):
        a, b, c = (float(match[i].replace(",", "")) for i in (1, 3, 4))
        op = {"×": "*", "x": "*", "÷": "/"}.get(match[2], match[2])
        if not (op == "/" and b == 0):
            yield abs(eval(f"a {op} b") - c) < 1e-9


def test_real_solutions(shared):
    """GSM8K: what comes before the error is unchanged; no other equation becomes false; the answer is another."""
    rows = [json.loads(line) for line in (shared / "gsm8k" / "train.jsonl").read_text().splitlines()][:1500]
    some = 0
    for row in rows:
        answer = answers.gold(row["answer"]).text
        right = mistakes.plain(row["answer"])
        false = list(equations(right)).count(False)
        possible = tasks.leading_astray(mistakes.errors(row["question"], row["answer"]), answer)
        some += bool(possible)
        for kind, places in possible.items():
            for text in (texts[0] for texts in places.values()):
                assert answers.read("number", text) not in (None, answer)
                assert list(equations(text)).count(False) <= false + (kind == "arithmetic_slip"), (right, text)
                assert text.count("\n") == right.count("\n") - (kind == "dropped_step")
                assert "<<" not in text
    assert some > len(rows) / 2
