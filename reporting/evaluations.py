"""What evaluate.py found out about a run's final/: results.json and every answer."""

import os
from pathlib import Path
from typing import NamedTuple

from files import InputError, read_json
from reporting import jsonl


class Evaluation(NamedTuple):
    """What evaluate.py wrote."""

    path: Path  # results.json
    table: list  # its lines
    answers: dict  # {task: {item: {model: row}}}


def find(run, given):
    """The Evaluations of the run's final/: in the folder `given`, else in folders beside the run or in it."""
    if given:
        return [read_evaluation(Path(given) / "results.json")]
    folder, final = run.folder.resolve(), (run.folder / "final").resolve()
    near = {*folder.parent.glob("*/results.json"), *folder.glob("**/results.json")}
    found = []
    for path in sorted(near):
        try:
            models = [model["path"] for model in read_json(path, "evaluate.py")["models"].values()]
        except (InputError, KeyError, TypeError, AttributeError):
            continue
        moved = [run.folder / os.path.relpath(model, run.arguments["output_dir"]) for model in models]
        if final in [Path(model).resolve() for model in (*models, *moved)]:
            found.append(read_evaluation(path))
    return found


def read_evaluation(path):
    """The Evaluation of a results.json; InputError if evaluate.py did not write it."""
    results = read_json(path, "python evaluate.py --model runs/NAME/final --output_dir FOLDER")
    table, files = results.get("table"), results.get("files")
    if not (isinstance(table, list) and isinstance(files, list) and all(map(is_result, table))):
        raise InputError(
            f"{path}: not written by evaluate.py; give --evaluation the --output_dir of an evaluate.py command"
        )
    answers = {}
    for line in table:
        if line["file"] not in files:
            continue
        for row in jsonl.rows_of(path.parent / line["file"]):
            if {"id", "prompt", "response", "correct"} <= row.keys() and isinstance(row["id"], (str, int)):
                item = answers.setdefault(line["task"], {}).setdefault(row["id"], {})
                item.setdefault(line["model"], row)  # of several samples the first
    return Evaluation(path, table, answers)


def read_tables(path):
    """The tables of a JSON file: [{"title", "note", "head", "rows"}]; InputError if it holds no such tables."""
    found = read_json(path, "examples/reason.sh").get("tables")
    if not isinstance(found, list) or not all(map(is_table, found)):
        raise InputError(f"{path}: expected tables of title, note, head and rows, as examples/reason.sh writes them")
    return found


def is_table(found):
    """Whether it is a table of read_tables()."""
    return isinstance(found, dict) and {"title", "note", "head", "rows"} <= found.keys()


def is_result(line):
    """Whether a line of results.json's table is one."""
    needed = {"task", "model", "n", "file"}
    return isinstance(line, dict) and needed <= line.keys() and ("accuracy" in line or not line["n"])
