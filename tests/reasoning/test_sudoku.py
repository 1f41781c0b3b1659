"""Tests of sudoku.py: the rules are checked by this file's own code, from the text alone.

bash tests/run.sh tests/reasoning/test_sudoku.py
"""

import hashlib
import random
import re
from collections import Counter

import pytest

from reasoning import answers, sudoku, tasks

SHA256 = "bc5a508d9037e75cab215c7cd3351b1f7330e228afbb15ec9ab7772faf582a2c"
RESPONSE = re.compile(r"<reasoning>\n((?:.+\n)+)</reasoning>\n<answer>\n(\d+)\n</answer>")
LINE = re.compile(r"Row ([1-4]), column ([1-4]): (?:not (.*), so )?([1-4])\.")
UNITS = [[4 * i + j for j in range(4)] for i in range(4)] + [[4 * j + i for j in range(4)] for i in range(4)]
UNITS += [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
PUZZLE, SOLVED = "3102 2000 0210 0320", "3142243142131324"  # the first of d1's test file
OPEN = "1234 3412 0000 0000"  # several grids complete it


@pytest.fixture(scope="module")
def problems():
    return tasks.generate(60, "train", 1, ("sudoku",))


def told(prompt):
    return re.search(r"\n\nSolve the following Sudoku puzzle: ([0-4]{16})\n\Z", prompt)[1]


def parts(response):
    """([(cell, the digits that it excludes, digit)], answer) of a response."""
    lines, said = RESPONSE.fullmatch(response).groups()
    found = [LINE.fullmatch(line).groups() for line in lines.splitlines()]
    return [(4 * int(row) + int(column) - 5, (out or "").split(", "), digit) for row, column, out, digit in found], said


def is_solved(grid):
    return len(grid) == 16 and all({grid[cell] for cell in unit} == set("1234") for unit in UNITS)


def solved_by(puzzle):
    """Every grid that completes a puzzle, by trying all digits."""
    if "0" not in puzzle:
        return [puzzle] if is_solved(puzzle) else []
    cell = puzzle.index("0")
    near = {puzzle[other] for unit in UNITS if cell in unit for other in unit}
    tried = [puzzle[:cell] + digit + puzzle[cell + 1 :] for digit in "1234" if digit not in near]
    return [grid for each in tried for grid in solved_by(each)]


def verdict(response, gold=PUZZLE):
    return answers.grade("sudoku", gold, response)["correct"]


# --- problems and planted errors --------------------------------------------------------------------------


def test_same_seed_same_data():
    """Whoever trains on these rows gets the same ones."""
    rows = list(tasks.preference_rows(20, "train", 0, ("sudoku",)))
    text = "\n".join(row["prompt"] + row["chosen"] + row["rejected"] + row["meta"]["answer"] for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256


def test_there_are_288_grids_of_two_classes():
    assert sorted(sudoku.grids()) == sorted(solved_by("0" * 16)) and len(set(sudoku.grids())) == 288
    assert len({sudoku.class_of(grid) for grid in sudoku.grids()}) == 2


def test_each_line_of_a_solution_follows_and_the_answer_is_the_only_one(problems):
    for problem in problems:
        cells = list(told(problem.prompt))
        lines, said = parts(problem.solution)
        assert solved_by("".join(cells)) == [said] and 6 <= cells.count("0") <= 10
        for cell, out, digit in lines:
            near = {cells[other] for unit in UNITS if cell in unit for other in unit} - {"0"}
            assert cells[cell] == "0" and set(out) == near == set("1234") - {digit}
            cells[cell] = digit
        assert "".join(cells) == said and tasks.verify(problem, problem.solution)


def test_planted_errors_are_wrong_and_of_their_kind(problems):
    seen = Counter()
    for problem in problems[:12]:
        puzzle, right = told(problem.prompt), parts(problem.solution)[0]
        for kind, by_place in tasks.corruptions(problem).items():
            for place, texts in by_place.items():
                for text in texts:
                    seen[kind] += 1
                    lines, said = parts(text)
                    assert tasks.verify(problem, text) is False and lines[:place] == right[:place]
                    if kind == "wrong_conclusion":
                        assert lines == right and not is_solved(said) and 15 <= len(said) <= 17
                    elif kind == "dropped_step":
                        assert said.count("0") == 1 and said[right[place][0]] == "0"
                        assert all(len(out) == 3 for _, out, _ in lines)
                    else:
                        assert kind == "overlooked_digit" and lines[place][2] in right[place][1]
                        filled = {cell: digit for cell, _, digit in lines}
                        assert said == "".join(filled.get(cell, given) for cell, given in enumerate(puzzle))
                    assert all(digit not in out for _, out, digit in lines)
    assert set(seen) == {"overlooked_digit", "dropped_step", "wrong_conclusion"}


# --- splits -----------------------------------------------------------------------------------------------


def changed(rng, puzzle):
    """The puzzle with other digits, turned or mirrored, and with rows, columns, bands or stacks exchanged."""
    rows = [list(puzzle[i : i + 4]) for i in (0, 4, 8, 12)]
    for _ in range(2):
        top, bottom = rng.sample(rows[:2], 2), rng.sample(rows[2:], 2)
        rows = rng.choice([top + bottom, bottom + top])
        rows = [list(column) for column in zip(*rows)]
    if rng.random() < 0.5:
        rows = [list(column) for column in zip(*rows)]
    digits = str.maketrans("1234", "".join(rng.sample("1234", 4)))
    return "".join(map("".join, rows)).translate(digits)


def test_a_changed_puzzle_is_of_the_same_class_and_so_of_the_same_split(problems):
    rng = random.Random(0)
    classes = {sudoku.class_of(told(problem.prompt)) for problem in problems}
    assert len(classes) > 50
    for problem in problems[:20]:
        puzzle = told(problem.prompt)
        others = {changed(rng, puzzle) for _ in range(10)}
        assert len(others) > 3 and {sudoku.class_of(other) for other in others} == {sudoku.class_of(puzzle)}


def test_splits_share_no_class(monkeypatch):
    monkeypatch.setattr(sudoku, "EMPTY", (11,))  # of 96 classes, so that the splits would meet
    classes = {}
    for split in ("train", "test"):
        found = tasks.generate(40, split, 3, ("sudoku",))
        classes[split] = {sudoku.class_of(told(problem.prompt)) for problem in found}
        assert len(classes[split]) < 40
    assert not classes["train"] & classes["test"]


# --- the verifier -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, correct",
    [
        (f"<answer>\n{SOLVED}\n</answer>", True),
        ("<answer>\n3142\n2431\n4213\n1324\n</answer>", True),
        ("<answer>\n| 3 | 1 | 4 | 2 |\n| 2 | 4 | 3 | 1 |\n| 4 | 2 | 1 | 3 |\n| 1 | 3 | 2 | 4 |\n</answer>", True),
        (f"<answer>\n```\n{SOLVED}\n```\n</answer", True),
        (f"<answer>The solved 4x4 puzzle is:\n{SOLVED}</answer>", True),
        (f"\\boxed{{{SOLVED}}}", True),
        ("#### 3142 2431 4213 1324", True),
        (f"The answer is {SOLVED}.", True),
        (f"3102200002100320 becomes\n{SOLVED}", True),
        ("So:\n3 1 4 2\n2 4 3 1\n4 2 1 3\n1 3 2 4\nEach row is complete.", True),
        ("<answer>\n3102200002100320\n</answer>", False),  # the puzzle
        (f"<answer>\n{SOLVED[:-1]}\n</answer>", False),
        (f"<answer>\n{SOLVED}4\n</answer>", False),
        (f"<answer>\n{SOLVED.replace('4', '5')}\n</answer>", False),
        ("<answer>\n3142243141321324\n</answer>", False),  # a column holds a digit twice
        ("<answer>\n1234341221434321\n</answer>", False),  # a grid that changes what is given
        ("<answer>\n[16-character solution string with no spaces or separators]\n</answer>", None),
        ("<answer>There is no solution.</answer>", None),
        ("Row 1, column 3: not 1, 2, 3, so 4.", None),
        ("", None),
    ],
)
def test_a_grid_is_read_however_it_is_written(said, correct):
    assert verdict(said) is correct


def test_any_grid_that_completes_the_puzzle_is_accepted():
    solutions = solved_by(OPEN.replace(" ", ""))
    assert len(solutions) > 1 and all(verdict(f"<answer>{each}</answer>", OPEN) for each in solutions)
    others = [grid for grid in sudoku.grids() if grid not in solutions]
    assert not any(verdict(f"<answer>{each}</answer>", OPEN) for each in others)


def test_the_share_of_cells_is_that_of_the_solution_that_is_named_or_most_like_the_answer():
    def cells(said, gold=PUZZLE):
        return answers.grade("sudoku", gold, f"<answer>{said}</answer>")["cells"]

    assert cells(SOLVED) == 1 and cells("nothing") == 0 and cells("3102200002100320") == 0
    assert cells("3142") == cells("3142" + "0" * 12) == 1 / 8  # one of eight empty cells
    assert cells(SOLVED[:-1] + "1") == 7 / 8 and cells(SOLVED + "11") == 1  # too long: the first 16 count
    first, *others = solved_by(OPEN.replace(" ", ""))
    assert {cells(each, OPEN) for each in (first, *others)} == {1.0}
    named = f"{OPEN}, such as {' '.join(re.findall('....', first))}"
    assert cells(first, named) == 1 and max(cells(each, named) for each in others) < 1
    assert all(verdict(f"<answer>{each}</answer>", named) for each in (first, *others))
    assert cells("0", "1111 1111 1111 1110") == 0  # nothing completes it


def test_the_gold_answer_tells_its_kind():
    assert answers.gold(PUZZLE) == answers.Gold("sudoku", PUZZLE)
    assert answers.gold(f"{PUZZLE}, such as 3142 2431 4213 1324").kind == "sudoku"
    assert answers.gold("3102200002100320").kind == "number"


def test_two_answers_agree_if_they_are_the_same_grid():
    """What a vote counts, right or wrong."""
    assert sudoku.same(SOLVED, SOLVED) and sudoku.same("1111", "1111") and not sudoku.same(SOLVED, "3102200002100320")
