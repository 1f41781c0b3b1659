"""Tests of problems.py: problems as people have them, and columns that are not read.

bash tests/run.sh tests/reasoning/test_problems.py
"""

import json

import pytest

from files import InputError
from reasoning import problems

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "Q"}


def read(tmp_path, *rows, **options):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return problems.read(str(path), **options)


@pytest.mark.parametrize(
    "row, prompt, gold, not_read",
    [
        ({"prompt": "Q", "answer": 12}, "Q", ("number", "12"), None),
        ({"question": "Q", "answer": "7 + 5 = <<7+5=12>>12\n#### 12"}, "Q", ("number", "12"), None),
        (
            {"problem": "Q", "solution": "So $12$.", "answer": "(B)", "subject": "Algebra", "unique_id": "t/1"},
            "Q",
            ("letter", "B"),
            "subject, unique_id, solution",
        ),
        ({"prompt": [USER], "answer": 12.5, "level": 3}, [USER], ("number", "12.5"), "level"),
        ({"prompt": "Q", "answer": True}, "Q", ("words", "True"), None),
        ({"prompt": "Q", "context": "C", "answer": "Mia"}, "C\n\nQ", ("words", "Mia"), None),
        ({"prompt": "Q", "system": "S", "answer": "9:35"}, [SYSTEM, USER], ("time", "9:35"), None),
    ],
)
def test_problems_as_people_have_them(tmp_path, capsys, row, prompt, gold, not_read):
    [own] = read(tmp_path, row)
    assert (own.prompt, (own.kind, own.answer)) == (prompt, gold) and own.place.endswith("problems.jsonl:1")
    assert ("Q" in own.text) and ("not read" in (said := capsys.readouterr().out)) == bool(not_read)
    assert not not_read or f"not read: {not_read}\n" in said


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "Q", "solution": "8"}, "name yours with --columns prompt=...,answer=..."),
        ({"answer": "8"}, 'expected a "prompt"'),
        ("Q", 'expected a "prompt"'),
        ({"prompt": "Q", "answer": ["8"]}, 'expected a "prompt"'),
        ({"prompt": 5, "answer": "8"}, 'expected a "prompt"'),
        ({"prompt": "Q", "answer": "two\nlines"}, "nothing that can be verified"),
        ({"prompt": "Q", "answer": "#### "}, "nothing that can be verified"),
        ({"question": "Q", "options": ["a red one", "a blue one"], "answer": "A"}, "--columns context=options"),
        ({"prompt": "Q", "note": "Ten pens are a box.", "answer": 8}, "--ignore_columns note"),
        ({"question": "Q", "choices": ["4", "5"], "answer": 1}, "nothing reads choices"),
        ({"prompt": "Q", "image": "a.png", "answer": 8}, "nothing reads image"),
        ({"prompt": [USER | {"tool_calls": [{"name": "f"}]}], "answer": 8}, "nothing reads tool_calls"),
        ({"prompt": "Q", "context": [["T", ["one", "two"]]], "answer": 8}, "'context'"),
    ],
)
def test_rows_that_are_refused(tmp_path, row, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, {"prompt": "Q", "answer": 1}, row)
    assert f"{tmp_path}/problems.jsonl:2: " in str(error.value) and words in str(error.value)


def test_worked_solutions(tmp_path, capsys):
    row = {"problem": "Q", "solution": "7 + 5 = 12\n#### 12", "answer": "12"}
    [own] = read(tmp_path, row, names=problems.WORKED)
    assert (own.solution, own.answer) == (row["solution"], "12") and "not read: answer" in capsys.readouterr().out


def test_columns_that_are_named_and_that_are_ignored(tmp_path, capsys):
    row = {"q": "Q", "gold": "8", "hint": "H is it.", "note": "Ten pens are a box."}
    [own] = read(tmp_path, row, given={"prompt": "q", "answer": "gold", "context": "hint"}, ignored=["note"])
    assert (own.prompt, own.answer) == ("H is it.\n\nQ", "8") and "not read: note" in capsys.readouterr().out
    [own] = read(tmp_path, {"prompt": [USER | {"tool_calls": [{"name": "f"}]}], "answer": 8}, ignored=["tool_calls"])
    assert own.text == "Q"
    with pytest.raises(InputError, match="no column 'nots'"):
        read(tmp_path, row, given={"prompt": "q"}, ignored=["nots"])
