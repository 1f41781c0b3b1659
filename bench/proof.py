"""A gain that was not planted: 4x4 Sudoku, several digits a pass. The problems, and the table at the end of proof.sh.

    python bench/proof.py problems --out runs/proof     gold.jsonl, problems.jsonl, test.jsonl
    python bench/proof.py table --out runs/proof        of reason.sh's folders runs/proof/seed-*

A puzzle is 16 digits in reading order, 0 an empty cell; the response is the solved grid, and any right one counts. 8 to
12 cells are empty, so that half of the puzzles have one solution and the others several. A base learns from solved
grids alone, by SFT, until more of them add nothing. Token by token it solves everything; what it loses is lost because
the tokens of one pass are chosen as if they were independent. No test puzzle is a training puzzle with other digits,
turned, mirrored or with rows or columns exchanged (reasoning/sudoku.py, class_of).
"""

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import improve

from files import replacing, write_json
from reasoning import comparison, sudoku, tasks

EMPTY = range(8, 13)  # cells
GOLD, PROBLEMS, TEST = 100_000, 10_000, 2_000


def puzzles(count, split, seed):
    """`count` different (puzzle, one of its solutions) of a split; each solution is as likely as any other."""
    rng, found = random.Random(f"{split} {seed}"), {}
    while len(found) < count:
        solved, empty = rng.choice(sudoku.grids()), rng.sample(range(16), rng.choice(EMPTY))
        puzzle = "".join("0" if cell in empty else digit for cell, digit in enumerate(solved))
        if tasks.split_of(sudoku.class_of(puzzle)) == split:
            found.setdefault(puzzle, solved)
    return found.items()


def write(path, rows):
    with replacing(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{path}: {len(rows)} rows")


def problem(puzzle, solved):
    _, _, gold = sudoku.ask(puzzle, solved)
    return {"prompt": puzzle + "\n", "answer": gold}


def write_problems(out, gold, count, test):
    """The base's solved grids, the problems to sample and to validate on, and the test items."""
    out.mkdir(parents=True, exist_ok=True)
    solved = [{"prompt": puzzle + "\n", "response": grid} for puzzle, grid in puzzles(gold, "train", 1)]
    write(out / "gold.jsonl", solved)
    write(out / "problems.jsonl", [problem(*each) for each in puzzles(count, "train", 2)])
    write(out / "test.jsonl", [problem(*each) for each in puzzles(test, "test", 3)])


# --- the table --------------------------------------------------------------------------------------------


def by_solutions(seeds):
    """{model: {"one" or "several" solutions: its n, accuracy and interval}} of all seeds."""
    answers = improve.joined(seeds)
    for [row] in itertools.chain(*answers.values()):
        row["solutions"] = "one" if len(sudoku.solutions(row["prompt"][:16])) == 1 else "several"
    return {name: comparison.parts(items, "solutions") for name, items in answers.items()}


def table(out):
    seeds = improve.read_all([path.parent for path in sorted(out.glob("seed-*/results.json"))])
    found = improve.pooled(seeds) | {"by_solutions": by_solutions(seeds)}
    write_json(out / "results.json", found)
    improve.print_table(found)
    for name, parts in found["by_solutions"].items():
        cells = [f"{part}: {each['accuracy']:.3f} of {each['n']}" for part, each in sorted(parts.items())]
        print(f"{improve.NAMES[name]}, puzzles with one solution or several: {', '.join(cells)}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["problems", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--gold", type=int, default=GOLD, help="solved grids")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="to sample and to validate on")
    parser.add_argument("--test", type=int, default=TEST, help="test items")
    args = parser.parse_args(argv)
    if args.what == "problems":
        write_problems(args.out, args.gold, args.problems, args.test)
    else:
        table(args.out)


if __name__ == "__main__":
    main()
