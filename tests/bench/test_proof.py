"""Tests of bench/proof.py: its puzzles, whose classes divide training from test, and what counts as right.

bash tests/run.sh tests/bench/test_proof.py
"""

import json
import sys

from small import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import proof

from reasoning import sudoku, tasks


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_problems(tmp_path, capsys):
    """No test puzzle is a training puzzle seen otherwise; every solution of a puzzle is right, another grid is not."""
    size = ["--gold", "60", "--problems", "50", "--test", "20"]
    proof.main(["problems", "--out", str(tmp_path), *size])
    gold, problems, test = (read(tmp_path / f"{name}.jsonl") for name in ("gold", "problems", "test"))
    assert [len(rows) for rows in (gold, problems, test)] == [60, 50, 20]
    trained, held_out = ({sudoku.class_of(row["prompt"][:16]) for row in rows} for rows in (gold + problems, test))
    assert not trained & held_out
    assert all(row["response"] in sudoku.solutions(row["prompt"][:16]) for row in gold)
    several = [row for row in problems + test if len(sudoku.solutions(row["prompt"][:16])) > 1]
    assert 15 < len(several) < 55
    for row in several:
        right = sudoku.solutions(row["prompt"][:16])
        assert all(tasks.verify(row["answer"], grid) for grid in right)
        wrong = [grid for grid in sudoku.grids()[:40] if grid not in right]
        assert wrong and not any(tasks.verify(row["answer"], grid) for grid in wrong)


def test_puzzles_are_the_same_on_every_machine():
    """The first ones of a longer list are those of a shorter one."""
    assert list(proof.puzzles(9, "train", 2))[:4] == list(proof.puzzles(4, "train", 2))
    assert list(proof.puzzles(2, "train", 1)) == [
        ("3000003421030300", "3421123421434312"),
        ("0230030131400000", "1234432131422413"),
    ]
