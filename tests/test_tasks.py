"""Tests of tasks.py: every claim is checked by a parser of this file's own, from the text alone.

    .venv/bin/python -m pytest -q tests/test_tasks.py
"""
import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tasks

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
# The digest of generate(50, "train", 0): a change of it is a change of everybody's data.
PROMPTS_SHA256 = "4947fab07d374a2f674fe8ae43e60d81d578c1e5e20a8c056c6c5a104459e7fe"


@pytest.fixture(scope="module")
def problems():
    return tasks.generate(3000, "train", 0)


def parse(text):
    """" 7 + 5 = 12\\n#### 12" -> ([(7, "+", 5, 12)], 12); fails on any other form."""
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
    words.update({thing: "@things" for thing in tasks.THINGS})
    people = {}

    def replace(match):
        word = match[0]
        if word in tasks.NAMES:
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
        assert re.fullmatch(r"Question: ([A-Z][A-Za-z0-9 ]+\. )+How many [a-z ]+([A-Z][a-z]+ |[a-z]+ )have( now)?\?\nAnswer:",
                            problem.prompt), problem.prompt
        assert "  " not in problem.prompt
        words.update(re.findall(r"[A-Za-z]+", problem.prompt))
        people = {word for word in re.findall(r"[A-Z][a-z]+", problem.prompt) if word in tasks.NAMES}
        pronouns = set(re.findall(r"\b(?:he|she|him|her)\b", problem.prompt))
        assert not pronouns or len(people) == 1 and pronouns <= set(tasks.NAMES[people.pop()]), problem.prompt
    assert len(words) < 130
    assert set(tasks.NAMES) | set(tasks.THINGS) <= words


def test_prompts_are_unique(problems):
    assert len({problem.prompt for problem in problems}) == len(problems) == 3000
    assert len({problem.prompt for problem in tasks.generate(3000, "test", 0)}) == 3000


def test_a_family_that_repeats_itself_still_gives_unique_prompts(monkeypatch):
    rng = random.Random(2)
    pool = [tasks.draw_arithmetic(rng) for _ in range(40)]
    monkeypatch.setitem(tasks.FAMILIES, "arithmetic", lambda rng: tasks.pick(rng, pool))
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
    skeletons = {tasks.draw_arithmetic(rng)[0] for _ in range(4000)}
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

@pytest.mark.parametrize("text, answer", [
    (" 7 + 5 = 12\n#### 12", "12"),
    ("####8", "8"),
    ("#### 8.", "8"),
    ("####  8  \n", "8"),
    ("#### $1,200.0", "1200"),
    ("#### 1,234,567", "1234567"),
    ("#### -3", "-3"),
    ("#### -$3", "-3"),
    ("#### $-3.", "-3"),
    ("#### 2.50", "2.5"),
    ("#### 007", "7"),
    ("#### 0", "0"),
    ("#### -0.0", "0"),
    ("#### 8 pens", "8"),
    ("#### 3\n#### 4", "4"),
    ("#### 3\n5 + 5 = 10", "3"),
    ("#### 3 #### x", None),
    ("#### 8 5", None),
    ("#### 7 + 1 = 8", None),
    ("####\n8", None),
    ("#### ", None),
    ("### 8", None),
    ("the answer is 8", None),
    ("", None),
])
def test_extract_answer(text, answer):
    assert tasks.extract_answer(text) == answer


def test_verify_normalises_both_sides():
    assert tasks.verify("1,200", "#### 1200.0")
    assert not tasks.verify("8", "#### 18")
    assert not tasks.verify("8", "7 + 1 = 8")
    with pytest.raises(ValueError, match="'yes'"):
        tasks.verify("yes", "#### 8")


# --- planted errors ---------------------------------------------------------------------------------------

def planted_error(right, wrong):
    """The kind of the one error in `wrong`, found from the two lists of steps; None if it is not exactly one error."""
    if len(wrong) == len(right) - 1:
        for place in range(len(right)):
            kept = right[:place] + right[place + 1:]
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


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_each_kind_plants_exactly_its_error(problems, kind):
    rng, planted, places = random.Random(1), 0, Counter()
    for problem in problems:
        text, returned = tasks.corrupt(problem, rng, kind)
        right, _ = parse(problem.solution)
        wrong, answer = parse(text)
        assert planted_error(right, wrong) == returned, (problem.solution, text, returned)
        assert text != problem.solution and not tasks.verify(problem, text)
        assert answer == wrong[-1][3] != int(problem.answer)
        assert all(1 <= step[3] <= 99 for step in wrong)
        if returned == kind:
            planted += 1
            places[len(right), next((i for i, (r, w) in enumerate(zip(right, wrong)) if r != w), len(wrong))] += 1
    possible = sum(len(problem.steps) > 1 or kind != "dropped_step" for problem in problems)
    assert planted > 0.85 * possible  # another kind only where this one cannot be
    assert {(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)} <= set(places)  # at every line, its consequences worked out


def test_corrupt_chooses_among_all_kinds_and_repeats_with_its_rng(problems):
    first = [tasks.corrupt(problem, random.Random(i)) for i, problem in enumerate(problems)]
    assert first == [tasks.corrupt(problem, random.Random(i)) for i, problem in enumerate(problems)]
    counts = Counter(kind for _, kind in first)
    assert set(counts) == set(tasks.KINDS) and min(counts.values()) > 0.1 * len(problems)


def test_one_step_problem_never_drops_its_step_and_unknown_kind_is_refused(problems):
    single = next(problem for problem in problems if len(problem.steps) == 1)
    assert all(tasks.corrupt(single, random.Random(i), "dropped_step")[1] != "dropped_step" for i in range(20))
    with pytest.raises(ValueError, match="'typo'"):
        tasks.corrupt(single, random.Random(0), "typo")


# --- rows and the command line ----------------------------------------------------------------------------

def run_cli(*args, cwd):
    return subprocess.run([sys.executable, str(ROOT / "tasks.py"), *args], cwd=cwd, capture_output=True, text=True)


def test_command_line_writes_the_rows(tmp_path):
    done = run_cli("--out", "prefs.jsonl", "--num", "40", "--split", "test", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "prefs.jsonl").read_text().splitlines()]
    assert rows == list(tasks.preference_rows(40, "test", 3))  # another process, the same rows
    assert [row["prompt"] for row in rows] == [problem.prompt for problem in tasks.generate(40, "test", 3)]
    for row in rows:
        assert list(row) == ["prompt", "chosen", "rejected", "meta"]
        meta = row["meta"]
        assert set(meta) == {"family", "steps", "error", "answer"} and meta["family"] == "arithmetic"
        right, wrong = parse(row["chosen"])[0], parse(row["rejected"])[0]
        assert len(right) == meta["steps"] and planted_error(right, wrong) == meta["error"]
        assert tasks.verify(meta["answer"], row["chosen"]) and not tasks.verify(meta["answer"], row["rejected"])
    mean = sum(len(row["prompt"]) for row in rows) / len(rows)
    assert done.stdout.startswith("wrote 40 test rows to prefs.jsonl") and f"prompt {mean:.1f}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["prefs.jsonl"]  # no temporary file is left


@pytest.mark.parametrize("args, named", [
    (("--out", "x.jsonl", "--num", "0"), "--num is 0"),
    (("--out", "x.jsonl", "--num", "many"), "'many'"),
    (("--out", "x.jsonl", "--split", "valid"), "'valid'"),
    (("--out", "missing/x.jsonl"), "mkdir -p missing"),
    (("--out", "."), "a folder"),
    (("--out", "x.jsonl", "--sed", "1"), "--sed"),
    ((), "--out"),
])
def test_bad_arguments_are_one_sentence(tmp_path, args, named):
    done = run_cli(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
