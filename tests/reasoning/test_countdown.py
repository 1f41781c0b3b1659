"""Tests of countdown.py: every claim of a solution is checked from its text, by eval.

bash tests/run.sh tests/reasoning/test_countdown.py
"""

import hashlib
import re
from collections import Counter

import pytest

from reasoning import answers, countdown, tasks

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
SHA256 = "e3436ca4ac5127c2d5514cba26561af38e314b9f974434730c0b8144bd56e139"
RESPONSE = re.compile(r"<reasoning>\n((?:.+\n)+)</reasoning>\n<answer>\n\\boxed\{(.+)\}\n</answer>")


@pytest.fixture(scope="module")
def problems():
    return tasks.generate(200, "train", 1, ("countdown",))


def told(prompt):
    """(numbers, target) of a prompt."""
    numbers, target = re.search(r"\n\nNumbers: \[(.*)\]\nTarget: (\d+)\Z", prompt).groups()
    return [int(number) for number in numbers.split(", ")], int(target)


def parts(response):
    """(equations, expression) of a response."""
    lines, said = RESPONSE.fullmatch(response).groups()
    return [EQUATION.fullmatch(line).groups() for line in lines.splitlines()], said


def is_true(equation):
    a, op, b, c = equation
    return eval(f"{a} {op} {b} == {c}")


def used(text):
    return sorted(map(int, re.findall(r"\d+", text)))


def verdict(response, gold="10 from 83, 18, 75"):
    return answers.grade("countdown", gold, response)["correct"]


# --- problems and planted errors --------------------------------------------------------------------------


def test_same_seed_same_data():
    """Whoever trains on these rows gets the same ones."""
    rows = list(tasks.preference_rows(20, "train", 0, ("countdown",)))
    text = "\n".join(row["prompt"] + row["chosen"] + row["rejected"] + row["meta"]["answer"] for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256


def test_solutions_reach_the_target_with_every_number_once(problems):
    for problem in problems:
        numbers, target = told(problem.prompt)
        equations, said = parts(problem.solution)
        assert used(said) == sorted(numbers) and eval(said) == target and 1 <= target <= 100
        assert len(equations) == 2 and all(map(is_true, equations)) and int(equations[-1][3]) == target
        assert equations[0][3] in (equations[1][0], equations[1][2])
        assert all(1 <= number <= 100 for number in numbers)
        assert tasks.verify(problem, problem.solution)
    assert {op for problem in problems for op in problem.solution if op in "*/"} == {"*", "/"}


def test_parentheses_stand_only_where_they_are_needed():
    for way in countdown.ways([90, 5, 3]):
        inner = f"({way.a} {way.op} {way.b})"
        whole = f"{inner} {way.then} {way.other}" if way.is_first else f"{way.other} {way.then} {inner}"
        if eval(inner):
            bare = whole.replace("(", "").replace(")", "")
            needed = eval(bare.replace("/", "* 1.0 /")) != pytest.approx(eval(whole))
            said = countdown.spelled(way)
            assert eval(said) == pytest.approx(eval(whole)) and (needed or said == bare or way.other * eval(inner) == 0)
            assert needed <= ("(" in said)


def test_planted_errors_are_wrong_and_of_their_kind(problems):
    seen = Counter()
    for problem in problems[:60]:
        numbers, target = told(problem.prompt)
        for kind, by_place in tasks.corruptions(problem).items():
            for place, texts in by_place.items():
                for text in texts:
                    seen[kind] += 1
                    equations, said = parts(text)
                    true = [is_true(equation) for equation in equations]
                    assert tasks.verify(problem, text) is False
                    if kind == "arithmetic_slip":
                        assert not true[place] and true.count(False) == 1
                        assert used(said) == sorted(numbers) and int(equations[-1][3]) == target
                    elif kind == "wrong_number":
                        assert all(true) and eval(said) == target and used(said) != sorted(numbers)
                    elif kind == "wrong_operation":
                        right = parts(problem.solution)[0]
                        assert all(true) and used(said) == sorted(numbers) and equations[place][1] != right[place][1]
                    else:
                        assert kind == "dropped_step" and all(true) and len(used(said)) == 2
    assert set(seen) == {"arithmetic_slip", "wrong_number", "wrong_operation", "dropped_step"}


def test_splits_share_no_numbers_in_any_order(monkeypatch):
    monkeypatch.setattr(countdown, "LARGEST", 12)  # so few numbers that the splits would meet
    keys = {}
    for split in ("train", "test"):
        found = [told(problem.prompt)[0] for problem in tasks.generate(150, split, 0, ("countdown",))]
        keys[split] = {tuple(sorted(numbers)) for numbers in found}
        assert len(keys[split]) < 150
    assert not keys["train"] & keys["test"]


def test_the_prompt_does_not_show_the_solutions_order(problems):
    orders = Counter()
    for problem in problems:
        numbers, way = problem.facts
        orders[numbers.index(way.other)] += 1
    assert min(orders[place] for place in range(3)) > 30


# --- the verifier -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, correct",
    [
        (r"\boxed{18 - (83 - 75)}", True),
        (r"\boxed{75 - 83 + 18}", True),  # another way, which passes below zero
        (r"\boxed{-83 + 75 + 18}", True),
        (r"\boxed{18 - (83 - 75) = 10}", True),
        (r"\boxed{10 = 18 - (83 - 75)}", True),
        (r"\boxed{18 - \left(83 - 75\right)}", True),
        (r"\boxed{$18 − 83 + 75$}", True),
        ("<answer>\n18-83+75\n</answer>", True),
        ("<answer>\n\\boxed{18 + 75 - 83}\n</answer>", True),
        ("#### 18 + 75 - 83", True),
        ("The answer is 18 + 75 - 83.", True),
        ("18 + 75 - 83 = 10", True),
        (r"\boxed{83 - 75}", False),  # a number is not used
        (r"\boxed{18 - 8}", False),
        (r"\boxed{18 + 75 - 83 + 83 - 83}", False),  # one is used three times
        (r"\boxed{18 + 75 + 83}", False),
        (r"\boxed{10}", False),
        (r"\boxed{83 / (75 - 75) + 18}", False),
        (r"\boxed{18 ** 75 // 83}", False),
        (r"\boxed{18 - (83 - 75}", False),
        (r"\boxed{a + b * c}", None),
        (r"\boxed{83 - 75 = 8, 18 - 8 = 10}", None),
        (r"\boxed{...}", None),
        ("<answer>It is impossible.</answer>", None),
        ("83 - 75 = 8\n18 - 8 = 10", None),  # equations, and no answer
        ("", None),
    ],
)
def test_any_right_expression_is_accepted(said, correct):
    assert verdict(said) is correct


def test_signs_of_tex_and_exact_fractions():
    assert verdict(r"\boxed{4 \times (5 + 5)}", "40 from 4, 5, 5") and verdict("#### 4 × (5 + 5)", "40 from 5, 4, 5")
    assert verdict(r"\boxed{\frac{90}{3} \cdot 2}", "60 from 2, 3, 90")
    assert verdict(r"\boxed{90 \div 3 \times 2}", "60 from 2, 3, 90")
    assert verdict(r"\boxed{2 / (1 / 3)}", "6 from 1, 2, 3") and verdict(r"\boxed{(3 x 2) x 1}", "6 from 1, 2, 3")
    assert verdict(r"\boxed{100 / 3 / 7}", "4 from 3, 7, 100") is False  # 4.76: nothing is rounded


def test_expressions_that_are_long_or_deep_are_wrong_and_no_error():
    for text in ("(" * 5000 + "1" + ")" * 5000, "-" * 5000 + "1", "9" * 5000 + " - 1", "+".join("1" * 3000)):
        assert verdict(rf"\boxed{{{text}}}") is False


def test_the_gold_answer_tells_its_kind():
    assert answers.gold("10 from 83, 18, 75") == answers.Gold("countdown", "10 from 83, 18, 75")
    assert answers.gold("#### 10 from 83,18,75").kind == "countdown"
    assert answers.gold("10 from 83").kind != "countdown"


def test_two_answers_agree_if_they_use_the_same_numbers_for_the_same_value():
    """What a vote counts."""
    assert countdown.same("18 - (83 - 75)", "75 + 18 - 83") and not countdown.same("18 - 8", "75 + 18 - 83")
