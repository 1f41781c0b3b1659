"""Tests of benchmarks.py: gold answers and real responses, and files in their original formats.

bash tests/run.sh tests/reasoning/test_benchmarks.py
"""

import errno
import gzip
import json
import sys
from collections import Counter

import pytest

from files import InputError
from reasoning import answers, benchmarks
from reasoning.answers import f1, same_expression
from reasoning.benchmarks import read
from reasoning.marks import boxed


def grade(name, gold, response):
    return answers.grade(benchmarks.BENCHMARKS[name].kind, gold, response)


def lines(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- GSM8K ------------------------------------------------------------------------------------------------


def test_gsm8k_compares_the_number_and_nothing_else():
    assert grade("gsm8k", "1200", "#### $1,200.0") == {"extracted": "1200", "correct": True}
    assert grade("gsm8k", "1200", "#### 1201") == {"extracted": "1201", "correct": False}
    assert grade("gsm8k", "1200", "no idea") == {"extracted": None, "correct": None}


def test_the_gold_solutions_of_gsm8k_are_right(shared):
    for name, count in (("test", 1319), ("train", 7473)):
        rows = lines(shared / "gsm8k" / f"{name}.jsonl")
        assert len(rows) == count
        for row in rows:
            gold = benchmarks.ask_gsm8k(row).answer
            assert grade("gsm8k", gold, row["answer"])["correct"]
            assert gold == row["answer"].split("#### ")[1].replace(",", "")


def test_real_solutions_of_four_models_are_judged_as_their_authors_did(shared):
    """All 5276 verdicts agree: there is no exception to list. 7 solutions were cut off, and have no readable answer."""
    items = read("gsm8k", shared)
    count, right, unread, disagree = 0, 0, 0, []
    for item, row in zip(items, lines(shared / "gsm8k" / "example_model_solutions.jsonl.gz"), strict=True):
        assert row["question"] == item.question
        for model, said in row.items():
            if model not in ("question", "ground_truth"):
                count, right = count + 1, right + said["is_correct"]
                verdict = grade("gsm8k", item.answer, said["solution"])["correct"]
                unread += verdict is None
                if (verdict is True) != said["is_correct"]:
                    disagree.append((item.id, model))
    assert (count, right, unread, disagree) == (5276, 2001, 7, [])


def test_right_answers_of_llada_are_found_in_its_own_format(shared):
    """760 of 762, \\boxed or not; one response, there twice, ends in another box, 16200, after the right one, 162000.

    50 of the 762 wrong ones are right by number; 42 have no answer: an empty box, or one that is cut off.
    """
    gold = {item.question: item.answer for item in read("gsm8k", shared)}
    rows = lines(shared / "prefs_gsm8k_llada.jsonl")
    wrong = [
        found["extracted"]
        for row in rows
        if not (found := grade("gsm8k", gold[row["prompt"]], row["chosen"]))["correct"]
    ]
    assert wrong == ["16200"] * 2
    verdicts = Counter(grade("gsm8k", gold[row["prompt"]], row["rejected"])["correct"] for row in rows)
    assert verdicts == {True: 50, False: 670, None: 42}


# --- MATH -------------------------------------------------------------------------------------------------


def test_the_gold_solutions_of_math_are_right(shared):
    rows, items = lines(shared / "math" / "math500_test.jsonl"), read("math500", shared)
    assert len(items) == 500
    assert [boxed(row["solution"]) for row in rows] == [item.answer for item in items]
    assert all(grade("math500", item.answer, row["solution"])["correct"] for item, row in zip(items, rows))


@pytest.mark.parametrize(
    "said, gold, same",
    [
        ("0.5", r"\frac{1}{2}", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        ("2x + 1", "1+2x", True),
        ("Evelyn", r"\text{Evelyn}", True),
        (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)", True),
        ("10,080", "10080", True),
        ("x^2-1", "(x-1)(x+1)", True),
        ("90^\\circ", "90", True),
        ("5", "6", False),
        ("", "5", False),
        (r"\text{odd}", r"\text{even}", False),
        (r"\frac{", "3", False),
    ],
)
def test_math_verify_decides_what_is_equal(said, gold, same):
    pytest.importorskip("math_verify")
    assert (
        grade("math500", gold, rf"so \boxed{{{said}}}.")["correct"] is same if same else not same_expression(said, gold)
    )


def test_without_math_verify_equal_texts_need_none_and_others_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert same_expression(r"\sqrt {2}", r"\sqrt{2}")
    with pytest.raises(InputError, match="pip install -r requirements-eval.txt"):
        same_expression(r"\sqrt{8}", r"2\sqrt{2}")


# --- LogiQA -----------------------------------------------------------------------------------------------


def test_gold_letters_of_logiqa_are_right_and_others_are_wrong(shared):
    rows, items = lines(shared / "logiqa" / "LogiQA2_test_first500.jsonl"), read("logiqa", shared)
    assert len(items) == 500
    for row, item in zip(rows, items):
        assert f"\n{item.answer}. {row['options'][row['answer']]}\n" in item.prompt
        assert [grade("logiqa", item.answer, f"Hm.\nThe answer is {name}.")["correct"] for name in "ABCD"].index(
            True
        ) == row["answer"]


# --- HotpotQA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, gold, exact, overlap",
    [
        ("The Chief of Protocol.", "Chief of Protocol", True, 1.0),
        ("Greenwich Village", "Greenwich Village, New York City", False, 2 * 2 / (2 + 5)),
        ("new new york", "New York", False, 2 * 2 / (3 + 2)),
        ("yes", "yes", True, 1.0),
        ("yes, they are", "yes", False, 0.0),
        ("no", "a no man", False, 0.0),
        ("the", "an", True, 0.0),
        ("Paris", "London", False, 0.0),
    ],
)
def test_exact_match_and_f1_by_hand(said, gold, exact, overlap):
    graded = grade("hotpotqa", gold, said)
    assert graded["correct"] is exact and graded["f1"] == pytest.approx(overlap)


def test_short_answers():
    for said in (
        "Answer:\nParis",
        "**Answer:**\n\nParis",
        "The answer is:\n\nParis",
        "**Answer**: Paris",
        "\\boxed{Paris}",
        "<answer>Paris</answer>",
    ):
        assert answers.read("text", said) == "Paris"
    assert answers.read("text", "The answer isn't known") == "The answer isn't known"
    assert answers.read("text", "\n  Paris \nIt lies on the Seine") == "Paris"
    assert answers.read("text", "I think.\nThe answer is: Paris.\nYes") == "Paris."
    assert answers.read("text", "Answer: Rome\nNo. Answer: Paris") == "Paris"
    assert answers.read("text", " \n ") is None and grade("hotpotqa", "Paris", "") == {
        "extracted": None,
        "correct": None,
        "f1": 0.0,
    }


def test_gold_answers_of_hotpotqa_are_right(shared):
    items = read("hotpotqa", shared)
    assert len(items) == 500
    for item in items:
        assert grade("hotpotqa", item.answer, f" {item.answer}\n") == {
            "extracted": item.answer.strip(),
            "correct": True,
            "f1": 1.0,
        }
    assert f1("Animorphs series", "Animorphs") == pytest.approx(2 / 3)


@pytest.mark.parametrize("name, gold", [("gsm8k", "18"), ("hotpotqa", "Paris"), ("math500", "5"), ("logiqa", "A")])
def test_thoughts_are_no_answer(name, gold):
    """The text after a <think> block is graded; a thought that is cut off has no answer after it."""
    answers = {"gsm8k": "#### {}", "hotpotqa": "{}", "math500": "\\boxed{{{}}}", "logiqa": "The answer is {}."}
    other = {"gsm8k": "3", "hotpotqa": "Rome", "math500": "2", "logiqa": "B"}[name]
    right, wrong = (answers[name].format(said) for said in (gold, other))
    assert grade(name, gold, f"<think>\n\n</think>\n\n{right}")["correct"]
    assert grade(name, gold, f"<think>\nFirst.\n\nQuestion: so?\n{wrong}\n</think>\n\n{right}")["correct"]
    assert not grade(name, gold, f"<think>\n{right}\n</think>\n\n{wrong}")["correct"]
    assert grade(name, gold, f"<think>\n{right}")["correct"] is None


@pytest.mark.parametrize(
    "name, gold, text",
    [
        ("gsm8k", "18", "so 18\n#### 18\n\nQuestion: Tom has 2.\nAnswer: 2+3=5\n#### 5"),
        ("hotpotqa", "Paris", "Paris\n\nQuestion: Which?\nAnswer: Rome"),
        ("math500", "5", "\\boxed{5}\n\nProblem: What is 1+1?\nSolution: \\boxed{2}"),
        ("logiqa", "A", "The answer is A.\n\nQuestion: Why?\nAnswer: B"),
        ("logiqa", "B", "Let us see.\n\nQuestion: Which one follows?\nAnswer: B"),
    ],
)
def test_a_question_that_the_model_asks_itself_is_not_graded(name, gold, text):
    assert grade(name, gold, text)["correct"]


# --- reading ----------------------------------------------------------------------------------------------

HOTPOT = {
    "_id": "x",
    "question": "Who sang?",
    "answer": "Ada",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Ada", 0]],
    "context": [["Ada", ["Ada sang.", " Bo did not."]], ["Bo", ["Bo drew."]]],
}


def test_hotpotqa_with_its_paragraphs_in_both_forms(tmp_path):
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps([HOTPOT]))
    [item] = read("hotpotqa", tmp_path)
    assert item.question == "Who sang?" and item.prompt.startswith(
        "Ada: Ada sang. Bo did not.\n\nBo: Bo drew.\n\nQuestion: Who sang?\n"
    )
    hub = {**HOTPOT, "context": {"title": ["Ada", "Bo"], "sentences": [["Ada sang.", " Bo did not."], ["Bo drew."]]}}
    assert benchmarks.ask_hotpotqa(hub) == benchmarks.ask_hotpotqa(HOTPOT)


def test_countdown_and_sudoku_of_d1_in_their_own_formats(tmp_path):
    (tmp_path / "countdown_cd3_test.jsonl").write_text('{"input": "30,100,93", "output": "23"}\n')
    (tmp_path / "4x4_test_sudoku.csv").write_text("Puzzle,Solution\r\n3102200002100320,3142243142131324\r\n")
    [item] = read("countdown", tmp_path)
    assert item.question == "Numbers: [30, 100, 93]\nTarget: 23" and item.prompt.endswith(
        f"</answer>\n\n{item.question}"
    )
    assert grade("countdown", item.answer, r"\boxed{93 - (100 - 30)}")["correct"]
    assert grade("countdown", item.answer, r"\boxed{100 - 93 + 30 - 14}")["correct"] is False
    [item] = read("sudoku", tmp_path)
    assert item.prompt.endswith("</answer>\n\n\nSolve the following Sudoku puzzle: 3102200002100320\n")
    assert grade("sudoku", item.answer, "<answer>\n3142243142131324\n</answer>") == {
        "extracted": "3142243142131324",
        "correct": True,
        "cells": 1.0,
    }


@pytest.mark.parametrize(
    "name, file, text, said",
    [
        ("gsm8k", None, "", "looked for gsm8k/test.jsonl, test.jsonl"),
        ("gsm8k", "test.jsonl", "", "holds no row"),
        (
            "gsm8k",
            "test.jsonl",
            '{"question": "Q", "answer": "#### 3"}\n{"question": "Q"}',
            "row 2 is not one of gsm8k (no 'answer')",
        ),
        ("gsm8k", "test.jsonl", '{"question": "Q", "answer": "3 or 4, who knows ####"}', "no number after ####"),
        ("gsm8k", "test.jsonl", '{"question": ', "expected JSON"),
        (
            "math500",
            "test.jsonl",
            '{"question": "Q", "answer": "#### 3"}',
            "row 1 is not one of math500 (no 'problem')",
        ),
        (
            "logiqa",
            "test.txt",
            '{"text": "T", "question": "Q", "options": ["a", "b"], "answer": 0}',
            "row 1 is not one of logiqa",
        ),
        (
            "logiqa",
            "test.txt",
            '{"text": "T", "question": "Q", "options": ["a", "b", "c", "d"], "answer": -1}',
            "an answer of 0 to 3",
        ),
        ("gsm8k", "test.jsonl", '{"question": 5, "answer": "#### 3"}', "row 1 is not one of gsm8k"),
        ("hotpotqa", "hotpot_dev_1.json", '[{"question": "Q", "answer": 3}]', "row 1 is not one of hotpotqa"),
        ("hotpotqa", "hotpot_dev_1.json", '[{"question": "\\ud800", "answer": "A"}]', "row 1 is not one of hotpotqa"),
        ("hotpotqa", "hotpot_dev_1.json", '[{"question": "Q"}]', "row 1 is not one of hotpotqa (no 'answer')"),
        ("hotpotqa", "hotpot_dev_1.json", '["Q"]', "row 1 is not one of hotpotqa"),
        ("countdown", "countdown_cd3_test.jsonl", '{"input": "1,2,x", "output": "3"}', "row 1 is not one of countdown"),
        ("sudoku", "4x4_test_sudoku.csv", "Puzzle,Solution\n", "holds no row"),
        ("sudoku", "4x4_test_sudoku.csv", "puzzle\n3102200002100320\n", "row 1 is not one of sudoku (no 'Puzzle')"),
        ("sudoku", "4x4_test_sudoku.csv", "Puzzle,Solution\n1100000000000000,3142243142131324\n", "and its solution"),
    ],
)
def test_files_that_are_not_there_or_are_others(tmp_path, name, file, text, said):
    if file:
        (tmp_path / file).write_text(text)
    with pytest.raises(InputError) as error:
        read(name, tmp_path)
    assert said in str(error.value)


def test_two_files_of_one_benchmark_are_not_guessed_between(tmp_path):
    for split in ("fullwiki", "distractor"):
        (tmp_path / f"hotpot_dev_{split}_v1.json").write_text(json.dumps([HOTPOT]))
    with pytest.raises(InputError, match="several files of hotpotqa"):
        read("hotpotqa", tmp_path)


@pytest.mark.parametrize("name", [name for name, each in benchmarks.BENCHMARKS.items() if each.hub])
def test_the_hub_is_asked_for_the_right_data_set_and_its_absence_is_one_sentence(monkeypatch, name):
    import datasets

    asked = []

    def load_dataset(*path, split):
        asked.append((*path, split))
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="--data_dir"):
        read(name)
    assert asked == [benchmarks.BENCHMARKS[name].hub]


def test_a_disk_that_a_download_fills_is_no_lack_of_network(monkeypatch):
    """datasets wraps the error of the write into one of its own."""
    import datasets

    def load_dataset(*path, split):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/cache/gsm8k.arrow")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match="No space left on device: '/cache/gsm8k.arrow'"):
        read("gsm8k")
