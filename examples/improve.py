"""Several seeds of reason.sh in one table: each of them, and the test items of all pooled. The end of improve.sh.

    FOLDER/{plan.json, results.json, test/} of reason.sh, one per seed -> the table, and FILE
    python examples/improve.py runs/improve/seed-1 runs/improve/seed-2 --out runs/improve/results.json

Pooled are the items, so McNemar's exact test is that of the sums of items won and lost. It takes items to be
independent; seeds of a generated task draw their own, those of a benchmark share them, and the table says so.
"""

import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli import exits
from cli.parser import Parser
from files import InputError, check_out, read_json, write_json


def read_arguments(argv=None):
    """Namespace: folders, out."""
    parser = Parser([], __doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of reason.sh, its --out; one per seed")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
    args = parser.parse_args(argv)
    check_out(args.out)
    return args


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import reason_results

from reasoning import comparison, tasks

NAMES = {"start": "start", "rft": "RFT", "dpo": "DPO"}
TESTS = (("dpo", "start"), ("dpo", "rft"), ("rft", "start"))
MEND = "bash examples/reason.sh MODEL --out FOLDER"


class Seed(NamedTuple):
    """What reason.sh has measured on the test items of one seed."""

    number: int
    task: str  # without the folder of a file of problems, which may be the seed's own
    chosen: dict  # {"start", "rft" or "dpo": the model}
    answers: dict  # {the same: its rows on each item, comparison.grouped()}


def read(folder):
    """The Seed of a folder of reason.sh."""
    folder = Path(folder)
    results = read_json(folder / "results.json", MEND)
    if not {"task", "start", "methods"} <= results.keys():
        raise InputError(f"{folder}/results.json: not written by reason.sh; make such a folder with: {MEND}")
    number, methods = read_json(folder / "plan.json", MEND)["asked"]["seed"], results["methods"]
    chosen = {"start": results["start"]["model"]}
    chosen |= {name: methods[name]["model"] for name in NAMES if name in methods}
    lines = reason_results.lines_by_model(folder / "test")
    answers = {name: reason_results.answers_of(folder / "test", lines[model]) for name, model in chosen.items()}
    if results["task"] in tasks.FAMILIES:
        problems = tasks.generate(results["numbers"]["test"], "test", number, (results["task"],))
        steps = {problem.prompt: len(problem.steps) for problem in problems}
        for [row] in itertools.chain(*answers.values()):
            row["steps"] = steps[row["prompt"]]
    return Seed(number, Path(results["task"]).stem, chosen, answers)


def read_all(folders):
    """The Seeds of folders, which differ in their seed alone."""
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise InputError("a folder is named twice; expected one of reason.sh for each seed")
    seeds = [read(folder) for folder in folders]
    for folder, seed in zip(folders, seeds):
        if (seed.task, *seed.chosen) != (seeds[0].task, *seeds[0].chosen):
            raise InputError(
                f"{folder}: {seed.task} by {', '.join(seed.chosen)}, and {folders[0]} is {seeds[0].task} by "
                f"{', '.join(seeds[0].chosen)}; expected one task and the same methods"
            )
    return seeds


def joined(seeds):
    """{name: the answers of all seeds, one after the other}."""
    return {name: [item for seed in seeds for item in seed.answers[name]] for name in seeds[0].answers}


def pooled(seeds):
    """{"task", "seeds": [row_of() each, with "seed" and "chosen"], "pooled": row_of(), "by_steps"}.

    seeds: read_all(). by_steps: {name: {steps of the problem: its "n", "accuracy", "ci95"}} of all seeds; None if the
    problems were not generated.
    """
    rows = [{"seed": seed.number, "chosen": seed.chosen} | row_of(seed.answers) for seed in seeds]
    answers = joined(seeds)
    prompts = {json.dumps(item[0]["prompt"]) for item in answers["start"]}
    by_steps = None
    if all("steps" in row for [row] in answers["start"]):
        by_steps = {name: comparison.parts(items, "steps") for name, items in answers.items()}
    every = {"different_items": len(prompts)} | row_of(answers)
    return {"task": seeds[0].task, "seeds": rows, "pooled": every, "by_steps": by_steps}


def row_of(answers):
    """{"n", "models": {name: accuracy and interval}, "tests": {"dpo - start": comparison.against(), ...}}."""
    models = {name: comparison.accuracy_of(items) for name, items in answers.items()}
    tests = {
        f"{first} - {second}": comparison.against(answers[first], answers[second])
        for first, second in TESTS
        if {first, second} <= answers.keys()
    }
    return {"n": len(answers["start"]), "models": models, "tests": tests}


# --- the table --------------------------------------------------------------------------------------------


def print_table(found):
    """Print what pooled() has found."""
    rows, every = found["seeds"], found["pooled"]
    methods = [name for name in every["models"] if name != "start"]
    print(f"{found['task']}: test items solved; in brackets those won and lost, and p of McNemar's exact test")
    head = ["seed", "n", *(NAMES[name] for name in every["models"]), *map(titled, every["tests"]), "chosen"]
    cells = [[str(row["seed"]), *cells_of(row), ", ".join(labels(row, methods))] for row in rows]
    reason_results.print_columns([head, *cells, ["all", *cells_of(every), ""]])
    if every["different_items"] < every["n"]:
        print(f"{every['different_items']} of the {every['n']} items are different; p takes all to be independent")
    if found["by_steps"]:
        print("by steps of the problem, all seeds:")
        reason_results.print_columns(step_rows(found["by_steps"]))


def titled(test):
    """ "dpo - rft" -> "DPO - RFT"."""
    return " - ".join(NAMES[name] for name in test.split(" - "))


def cells_of(row):
    solved = [f"{each['accuracy']:.3f}" for each in row["models"].values()]
    return [str(row["n"]), *solved, *map(test_cell, row["tests"].values())]


def test_cell(test):
    """comparison.against() as +0.100 (2:0, 0.5)."""
    return f"{test['difference']:+.3f} ({test['won']}:{test['lost']}, {test['p']:.2g})"


def labels(row, methods):
    """Which run's model each method has chosen: "dpo", "start", "round-2/rft/rft-3"."""
    start = row["chosen"]["start"]
    paths = ["start" if row["chosen"][name] == start else row["chosen"][name] for name in methods]
    paths = [re.sub(r".*/(round-\d+/)", r"\1", path).removesuffix("/final") for path in paths]
    return [path.removeprefix("round-1/") for path in paths]


def step_rows(by_steps):
    """Rows of the table by steps."""
    rows = [["steps", "n", *(NAMES[name] for name in by_steps)]]
    for steps, part in by_steps["start"].items():
        rows.append([steps, str(part["n"]), *(f"{each[steps]['accuracy']:.3f}" for each in by_steps.values())])
    return rows


def main(argv=None):
    args = read_arguments(argv)
    found = pooled(read_all(args.folders))
    write_json(args.out, found)
    print_table(found)
    print(f"{args.out}: the same as JSON; every answer: test/*.jsonl of each folder")
    return 0


if __name__ == "__main__":
    exits.run(main)
