"""Tests of the layout: commands on top, rooms below them, imports that run one way.

bash tests/run.sh tests/test_structure.py
"""

import ast
import graphlib

import pytest
from small import ROOT

# A room imports files, config, the rooms below it and its own files. Lowest first.
ROOMS = ["cli", "models", "preferences", "scoring", "training", "reasoning", "reporting"]
COMMANDS = {"data_prep", "score", "train_dpo", "make_prefs", "generate", "evaluate", "report"}
COMMANDS |= {"plan", "calibrate", "merge", "convert", "check"}
GROUND = {"files": 0, "losses": 0, "cli": 1, "config": 2}  # below all other rooms
FLOOR = GROUND | {room: floor for floor, room in enumerate(ROOMS[1:], 3)}


def modules():
    """{module name: its source} of the commands and the rooms."""
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in paths}


def imported(source, known):
    """The modules of `known` that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known.keys()


def upward(known):
    """["room.module imports other.module"] for each import of a command or of a higher room."""
    wrong = []
    for name, source in known.items():
        if name in COMMANDS:
            continue
        here = FLOOR[name.partition(".")[0]]
        for other in imported(source, known):
            if other in COMMANDS or FLOOR[other.partition(".")[0]] > here:
                wrong.append(f"{name} imports {other}")
    return wrong


def test_the_top_holds_commands_alone():
    top = {path.stem for path in ROOT.glob("*.py")}
    assert top == COMMANDS | {"files", "losses", "config"}


def test_imports_run_downward():
    assert not upward(modules())


def test_no_import_is_part_of_a_cycle():
    known = modules()
    graph = {name: imported(source, known) - {name} for name, source in known.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    "name, line",
    [("models.head", "from training import engine"), ("scoring.noise", "import score"), ("files", "import config")],
)
def test_an_upward_import_is_found(name, line):
    known = modules()
    known[name] += f"\n\ndef planted():\n    {line}\n"
    assert upward(known)
