"""Tests of tasks.py: every claim is checked by a parser of this file's own, from the text alone.

bash tests/run.sh tests/reasoning/test_tasks.py
"""

import hashlib
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from files import InputError
from reasoning import arithmetic, tasks

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
# Digests of generate(50, "train", 0) and of its planted errors: a change of them is a change of everybody's data.
REJECTED_SHA256 = "2f2ab9f4b21c80eacd7a8b162b0c92e84ff484896b17f4f4de2a143ac58c4b14"
PROMPTS_SHA256 = "4947fab07d374a2f674fe8ae43e60d81d578c1e5e20a8c056c6c5a104459e7fe"


@pytest.fixture(scope="module")
def problems():
    return tasks.generate(3000, "train", 0)


def parse(text):
    """ " 7 + 5 = 12\\n#### 12" -> ([(7, "+", 5, 12)], 12); fails on any other form."""
    assert text.startswith(" ") and not text.startswith("  ")
    *lines, last = text[1:].split("\n")
    matches = [STEP.fullmatch(line) for line in lines]
    assert lines and all(matches), text
    answer = re.fullmatch(r"#### (\d+)", last)
    assert answer, text
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches], int(answer[1])


def is_true(step):
    a, op, b, c = step
    return {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": c * b == a}[op]


def blank(prompt):
    """The prompt without its names, pronouns and things: what the split must keep apart."""
    words = {"he": "@he", "she": "@he", "him": "@him", "her": "@him"}
    words |= dict.fromkeys(arithmetic.THINGS, "@things")
    people = {}

    def replace(match):
        word = match[0]
        if word in arithmetic.NAMES:
            return people.setdefault(word, f"@name{len(people)}")
        return words.get(word, word)

    return re.sub(r"[A-Za-z]+", replace, prompt)


# --- problems ---------------------------------------------------------------------------------------------


def test_every_solution_is_true_chained_and_verified(problems):
    for problem in problems:
        steps, answer = parse(problem.solution)
        assert tuple(steps) == problem.steps
        assert all(is_true(step) for step in steps), problem.solution
        assert all(later[0] == earlier[3] for earlier, later in zip(steps, steps[1:])), problem.solution
        assert str(answer) == problem.answer == str(steps[-1][3])
        assert tasks.verify(problem, problem.solution) and tasks.verify(problem.answer, problem.solution)
        assert not tasks.verify(problem, problem.solution + "1")
        assert problem.family in tasks.FAMILIES


def test_question_tells_exactly_the_numbers_of_the_solution(problems):
    for problem in problems:
        told = [int(number) for number in re.findall(r"\d+", problem.prompt)]
        assert told == [problem.steps[0][0]] + [step[2] for step in problem.steps], problem.prompt


def test_bounds_of_numbers_and_lengths(problems):
    for problem in problems:
        for place, (a, op, b, c) in enumerate(problem.steps):
            assert 2 <= a <= 99 and 2 <= b <= 20 and 1 <= c <= 99
            assert op in "+-" or b <= 9
            assert place == len(problem.steps) - 1 or c >= 2
        assert len(problem.prompt) <= 240 and len(problem.solution) <= 48


def test_mix_of_step_counts_and_operations(problems):
    counts = Counter(len(problem.steps) for problem in problems)
    assert set(counts) == {1, 2, 3}
    for steps, share in ((1, 0.40), (2, 0.35), (3, 0.25)):
        assert abs(counts[steps] / len(problems) - share) < 0.04
    ops = Counter(step[1] for problem in problems for step in problem.steps)
    assert set(ops) == set("+-*/") and min(ops.values()) > 0.12 * sum(ops.values())


def test_language_is_clean_and_closed(problems):
    words = set()
    for problem in problems:
        assert re.fullmatch(
            r"Question: ([A-Z][A-Za-z0-9 ]+\. )+How many [a-z ]+([A-Z][a-z]+ |[a-z]+ )have( now)?\?\nAnswer:",
            problem.prompt,
        ), problem.prompt
        assert "  " not in problem.prompt
        words.update(re.findall(r"[A-Za-z]+", problem.prompt))
        people = {word for word in re.findall(r"[A-Z][a-z]+", problem.prompt) if word in arithmetic.NAMES}
        pronouns = set(re.findall(r"\b(?:he|she|him|her)\b", problem.prompt))
        assert not pronouns or len(people) == 1 and pronouns <= set(arithmetic.NAMES[people.pop()]), problem.prompt
    assert len(words) < 130
    assert set(arithmetic.NAMES) | set(arithmetic.THINGS) <= words


def test_prompts_are_unique(problems):
    assert len({problem.prompt for problem in problems}) == len(problems) == 3000
    assert len({problem.prompt for problem in tasks.generate(3000, "test", 0)}) == 3000


def test_a_family_that_repeats_itself_still_gives_unique_prompts(monkeypatch):
    rng = random.Random(2)
    pool = [arithmetic.draw(rng) for _ in range(40)]
    monkeypatch.setitem(tasks.FAMILIES, "arithmetic", (lambda rng: tasks.pick(rng, pool), arithmetic.errors))
    assert len({problem.prompt for problem in tasks.generate(30, "train", 0)}) == 30


def test_splits_are_disjoint_whatever_the_seeds():
    prompts, keys = {}, {}
    for split in ("train", "test"):
        texts = [problem.prompt for seed in (0, 1, 2, 17) for problem in tasks.generate(4000, split, seed)]
        prompts[split], keys[split] = set(texts), {blank(text) for text in texts}
    assert not prompts["train"] & prompts["test"]
    assert not keys["train"] & keys["test"]
    # The keys do repeat within a split, so the test above compares something that could meet.
    assert len(keys["train"]) < len(prompts["train"])


def test_about_one_story_in_ten_is_a_test_story():
    rng = random.Random(5)
    skeletons = {arithmetic.draw(rng)[0] for _ in range(4000)}
    share = sum(tasks.split_of(skeleton) == "test" for skeleton in skeletons) / len(skeletons)
    assert 0.08 < share < 0.12


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'valid'"):
        tasks.generate(1, "valid")


def digest(found):
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def test_same_seed_same_problems():
    prompts = [problem.prompt for problem in tasks.generate(50, "train", 0)]
    assert digest(prompts) == PROMPTS_SHA256
    assert prompts != [problem.prompt for problem in tasks.generate(50, "train", 1)]
    assert prompts == [problem.prompt for problem in tasks.generate(80, "train", 0)][:50]


# --- verifier ---------------------------------------------------------------------------------------------


def test_verify_normalises_both_sides():
    assert tasks.verify("1,200", "#### 1200.0")
    assert tasks.verify("8", "#### 18") is False and tasks.verify("8", "#### 8 or 9") is None
    assert tasks.verify("9:05", "#### 09:05") and tasks.verify("Mia", "#### mia.")
    assert tasks.verify("Mia", "#### Max") is False
    with pytest.raises(ValueError, match="'####'"):
        tasks.verify("####", "#### 8")


# --- planted errors ---------------------------------------------------------------------------------------


def planted_error(right, wrong):
    """The kind of the one error in `wrong`, found from the two lists of steps; None if it is not exactly one error."""
    if len(wrong) == len(right) - 1:
        for place in range(len(right)):
            kept = right[:place] + right[place + 1 :]
            if [step[1:3] for step in kept] == [step[1:3] for step in wrong]:
                starts = [right[0][0]] + [step[3] for step in wrong[:-1]]
                faithful = [step[0] for step in wrong] == starts and all(map(is_true, wrong))
                return "dropped_step" if faithful else None
        return None
    if len(wrong) != len(right):
        return None
    found = []
    for place, (r, w) in enumerate(zip(right, wrong)):
        first = r[0] if place == 0 else wrong[place - 1][3]  # what a faithful step starts from here
        if w[1] != r[1]:
            found.append("wrong_operation")
        if w[0] != first or w[2] != r[2]:
            found.append("wrong_number_copied")
        if w[0] != first and (w[2] != r[2] or place > 0):
            found.append("two numbers, or a running result, which no question tells")
        if not is_true(w):
            found.append("arithmetic_slip")
    return found[0] if len(found) == 1 else None


def test_the_tests_own_parser_tells_the_kinds_apart():
    right = [(7, "+", 5, 12), (12, "-", 4, 8)]
    assert planted_error(right, right) is None
    assert planted_error(right, [(7, "+", 5, 13), (13, "-", 4, 9)]) == "arithmetic_slip"
    assert planted_error(right, [(7, "+", 5, 13), (13, "-", 4, 8)]) is None
    assert planted_error(right, [(7, "+", 4, 11), (11, "-", 4, 7)]) == "wrong_number_copied"
    assert planted_error(right, [(7, "+", 5, 12), (12, "+", 4, 16)]) == "wrong_operation"
    assert planted_error(right, [(7, "-", 4, 3)]) == "dropped_step"
    assert planted_error(right, [(8, "-", 4, 4)]) is None
    assert planted_error(right, [(7, "+", 5, 12), (13, "-", 4, 9)]) is None


def test_every_possible_error_is_exactly_its_kind(problems):
    counts, places = Counter(), Counter()
    for problem in problems[:600]:
        right, _ = parse(problem.solution)
        possible = tasks.corruptions(problem)
        assert "arithmetic_slip" in possible
        for kind, by_place in possible.items():
            counts[kind] += 1
            for place, found in by_place.items():
                for text in found:
                    wrong, answer = parse(text)
                    assert planted_error(right, wrong) == kind, (problem.solution, text, kind)
                    assert answer == wrong[-1][3] != int(problem.answer) and not tasks.verify(problem, text)
                    assert all(1 <= step[3] <= 99 for step in wrong)
                    differs = next((i for i, (r, w) in enumerate(zip(right, wrong)) if r != w), len(wrong))
                    assert place == differs or kind == "dropped_step" and place < differs  # two steps may look the same
                    places[len(right), place, kind] += 1
    several = sum(len(problem.steps) > 1 for problem in problems[:600])
    assert set(counts) == set(arithmetic.KINDS) and counts["dropped_step"] > 0.85 * several
    assert min(counts[kind] for kind in arithmetic.KINDS if kind != "dropped_step") > 0.95 * 600
    assert all(places[3, place, kind] for place in range(3) for kind in arithmetic.KINDS)
    assert not places[1, 0, "dropped_step"]


def test_corrupt_chooses_among_all_kinds_and_repeats_with_its_rng(problems):
    problems = problems[:400]
    first = [tasks.corrupt(problem, random.Random(i)) for i, problem in enumerate(problems)]
    assert first == [tasks.corrupt(problem, random.Random(i)) for i, problem in enumerate(problems)]
    counts = Counter(kind for _, kind in first)
    assert set(counts) == set(arithmetic.KINDS) and min(counts.values()) > 0.1 * len(problems)
    for problem, (text, kind) in zip(problems, first):
        assert any(text in found for found in tasks.corruptions(problem)[kind].values())


# --- rows -------------------------------------------------------------------------------------------------


def test_preference_rows():
    rows = list(tasks.preference_rows(40, "test", 3))
    assert [row["prompt"] for row in rows] == [problem.prompt for problem in tasks.generate(40, "test", 3)]
    for row in rows:
        assert list(row) == ["prompt", "chosen", "rejected", "meta"]
        meta = row["meta"]
        assert set(meta) == {"family", "steps", "error", "answer"} and meta["family"] == "arithmetic"
        right, wrong = parse(row["chosen"])[0], parse(row["rejected"])[0]
        assert len(right) == meta["steps"] and planted_error(right, wrong) == meta["error"]
        assert tasks.verify(meta["answer"], row["chosen"]) and not tasks.verify(meta["answer"], row["rejected"])
    assert digest([row["rejected"] for row in tasks.preference_rows(50, "train", 0)]) == REJECTED_SHA256


@pytest.mark.parametrize(
    "rate, n, low, high", [(0.5, 100, 0.4038, 0.5962), (0.9, 10, 0.5958, 0.9821), (0.0, 20, 0.0, 0.1611)]
)
def test_wilson(rate, n, low, high):
    """The proportions that lie 1.96 of their own standard errors from the one observed."""
    ends = tasks.wilson(rate, n)
    assert ends == pytest.approx([low, high], abs=1e-4)
    for p in ends:
        assert abs(rate - p) == pytest.approx(1.96 * math.sqrt(abs(p * (1 - p)) / n), abs=1e-6)


def test_more_problems_than_there_are():
    with pytest.raises(InputError, match="quantities are asked for; its test split has about 18"):
        tasks.generate(3000, "test", 0, ("quantities",))
