"""Tests of benchmarks.py: answers, checks, and files in their original formats.

bash tests/run.sh tests/reasoning/test_benchmarks.py
"""

import errno
import gzip
import json
import sys

import pytest

from files import InputError
from reasoning import benchmarks
from reasoning.benchmarks import boxed, f1, grade, gsm8k_answer, letter, read, same_expression, short_answer


def lines(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- GSM8K ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("####7", "7"),
        ("#### -3", "-3"),
        ("#### \u22123", "-3"),
        ("#### **18**", "18"),
        ("#### $1,200.50.", "1200.5"),
        ("#### 2,125", "2125"),
        ("#### 8 pens a day", "8"),
        ("#### 50%", "50"),
        ("#### 007", "7"),
        ("#### 0.0", "0"),
        ("#### -0", "0"),
        ("#### .5", "0.5"),
        ("#### 1/2", "1/2"),
        ("#### 3\nno\n#### 4\nor 5", "4"),
        ("#### 5 + 3", None),
        ("#### 5*3 = 15", None),
        ("9 of them\n####", None),
        ("#### nine", None),
        (r"so \boxed{1{,}200} of the 30", "1200"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{70,\!000}", "70000"),
        (r"\boxed{18\text{ dollars}}", "18"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{\frac{1}{2}}", None),
        (r"\boxed{}", None),
        (r"\boxed{3} #### 4", "4"),
        ("3 - 1 = 2", "2"),
        ("10-5", "5"),
        ("it is -5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("8 m2", "8"),
        ("1,234,567.00 in all.", "1234567"),
        ("The answer is 12.", "12"),
        ("(4)-2", "2"),
        ("24/6", "24/6"),
        ("A: 65960", "65960"),
        (r"\boxed{2:00 pm}", "2"),
        ("at 12:00.", "12"),
        ("none", None),
        ("", None),
    ],
)
def test_gsm8k_answer(text, answer):
    assert gsm8k_answer(text) == answer


def test_gsm8k_compares_the_number_and_nothing_else():
    assert grade("gsm8k", "1200", "#### $1,200.0") == {"extracted": "1200", "correct": True}
    assert grade("gsm8k", "1200", "#### 1201") == {"extracted": "1201", "correct": False}
    assert grade("gsm8k", "1200", "no idea") == {"extracted": None, "correct": False}


def test_the_gold_solutions_of_gsm8k_are_right(shared):
    for name, count in (("test", 1319), ("train", 7473)):
        rows = lines(shared / "gsm8k" / f"{name}.jsonl")
        assert len(rows) == count
        for row in rows:
            gold = benchmarks.ask_gsm8k(row).answer
            assert grade("gsm8k", gold, row["answer"])["correct"]
            assert gold == row["answer"].split("#### ")[1].replace(",", "")


def test_real_solutions_of_four_models_are_judged_as_their_authors_did(shared):
    """All 5276 verdicts agree: there is no exception to list. 11 solutions were cut off before their answer."""
    items = read("gsm8k", shared)
    count, right, disagree = 0, 0, []
    for item, row in zip(items, lines(shared / "gsm8k" / "example_model_solutions.jsonl.gz"), strict=True):
        assert row["question"] == item.question
        for model, said in row.items():
            if model not in ("question", "ground_truth"):
                count, right = count + 1, right + said["is_correct"]
                if grade("gsm8k", item.answer, said["solution"])["correct"] != said["is_correct"]:
                    disagree.append((item.id, model))
    assert (count, right, disagree) == (5276, 2001, [])


def test_right_answers_of_llada_are_found_in_its_own_format(shared):
    """760 of 762, \\boxed or not; one response, there twice, ends in another box, 16200, after the right one, 162000.

    59 of the 762 wrong ones are right by number, unboxed or cut off in the box.
    """
    gold = {item.question: item.answer for item in read("gsm8k", shared)}
    rows = lines(shared / "prefs_gsm8k_llada.jsonl")
    wrong = [
        found["extracted"]
        for row in rows
        if not (found := grade("gsm8k", gold[row["prompt"]], row["chosen"]))["correct"]
    ]
    assert wrong == ["16200"] * 2
    assert sum(grade("gsm8k", gold[row["prompt"]], row["rejected"])["correct"] for row in rows) == 59


# --- MATH -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"\boxed{3}", "3"),
        (r"\boxed{\frac{1}{2}} then \boxed{ \sqrt{2} }.", r"\sqrt{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{x}", "x"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{a{b}c", None),
        (r"\boxed{a} \boxed{b", None),
        ("5", None),
        ("", None),
    ],
)
def test_boxed(text, inside):
    assert boxed(text) == inside


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
    assert same_expression(r"\frac{1} {2}", r"\frac{1}{2}")
    with pytest.raises(InputError, match="pip install -r requirements-eval.txt"):
        same_expression("0.5", r"\frac{1}{2}")


# --- LogiQA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, name",
    [
        ("A: not implied.\nB: contradicts it.\nC: follows.\nD: irrelevant.\n\nSo the right option is C.", "C"),
        ("A. Not supported.\nB. Neither.\nC. Supported.\nD. No.\n\nTherefore, C is the correct answer.", "C"),
        ("Option A: wrong.\nOption B: right.\nTherefore, the best choice is B.", "B"),
        ("(A) is wrong.\n(B) wrong.\n(C) right.\nTherefore (C) is it", "C"),
        ("A. Some\nB. Others\nneither of them", None),
        ("The answer is A or B", None),
        ("The answer is either A or B.", None),
        ("The answer is A, B, and C.", None),
        ("The answer is C - only it follows", "C"),
        ("The answer is 'C'.", "C"),
        ("The answer is \u201cC\u201d.", "C"),
        (r"The answer is \(C\).", "C"),
        ("Therefore, option C is correct.", "C"),
        ("[C]", "C"),
        ("C!", "C"),
        ("<answer>C</answer>", "C"),
        ("None of A, B, C fit.", None),
        ("The answer is C, and A is wrong.", "C"),
        ("The answer is (A) or (B).", None),
        ("The answer is C", "C"),
        ("The answer is (C).", "C"),
        ("answer: B", "B"),
        ("the answer is **D**", "D"),
        ('Answer is "B"', "B"),
        (r"the answer is $\boxed{B}$", "B"),
        ("The answer is\nD", "D"),
        ("So the answer is option B.", "B"),
        ("The answer is A because", "A"),
        ("The answer is D. No: the answer is B.", "B"),
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"A or B? \boxed{(A)}", "A"),
        ("C", "C"),
        ("C.", "C"),
        ("(B) Some young", "B"),
        ("A. Some", "A"),
        ("Option D", "D"),
        ("I think it is C", "C"),
        ("So\nB", "B"),
        ("A teacher.\nSo the best is (D)", "D"),
        ("A or (B)\n(B) and (C)", None),
        ("The answer is A teacher", None),
        ("A teacher is here", None),
        ("answer is Dogs", None),
        ("Because", None),
        ("It's D'Artagnan", None),
        ("", None),
    ],
)
def test_letter(text, name):
    assert letter(text) == name


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
        assert short_answer(said) == "Paris"
    assert short_answer("The answer isn't known") == "The answer isn't known"
    assert short_answer("\n  Paris \nIt lies on the Seine") == "Paris"
    assert short_answer("I think.\nThe answer is: Paris.\nYes") == "Paris."
    assert short_answer("Answer: Rome\nNo. Answer: Paris") == "Paris"
    assert short_answer(" \n ") is None and grade("hotpotqa", "Paris", "") == {
        "extracted": None,
        "correct": False,
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
    assert grade(name, gold, f"<think>\n{right}")["extracted"] is None


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


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### Step 1: the cost\n5\n#### Step 2: the profit\n\nThe profit is \\boxed{70000}.", "70000"),
        ("#### Final Answer\n\\boxed{18}", "18"),
        ("#### 18\n####", "18"),
        ("#### 18\n#### 18\n####", "18"),
        ("#### 18####", "18"),
        ("#### $12/hour", "12"),
        ("#### 18 - the total earned", "18"),
        ("\\boxed{\\frac{240}{3} = 80}", "80"),
        ("#### 5 + 3", None),
        ("\\boxed{\\frac{1}{2}}", None),
    ],
)
def test_numbers_as_models_mark_them(text, number):
    assert gsm8k_answer(text) == number


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


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
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
