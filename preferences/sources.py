"""Where rows come from: a .jsonl, .json or .parquet file, or a data set of the Hub ("org/name"), through `datasets`.

Every row of a source becomes a Row. A row that is not JSON is marked malformed, so that it can be listed with its line.
A source that cannot be read is refused. forms.py and rows.py say what a row must hold.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonlines

from files import InputError, each_once, file_sha256, no_room, shorten
from models.folders import downloading

ENDINGS = (".jsonl", ".json", ".parquet")
KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


@dataclass
class Row:
    number: int  # line in a .jsonl, place in a .json list, from 1
    value: object  # the parsed JSON, or the raw text if it is not JSON
    reason: str = ""  # why it is left out
    detail: str = ""
    parts: tuple = ()  # prompt (a string or messages), list of responses
    ids: tuple = ()  # prompt, chosen, rejected as arrays of ids, uint32

    def leave_out(self, reason, detail=""):
        self.reason, self.detail = reason, detail


class LeftOut(Exception):
    """LeftOut(reason, detail): a row is not packed. The reason is counted, the detail is listed."""


class Malformed(LeftOut):
    """Malformed("expected ..., found ..."): a row is not of the form of its file."""

    def __init__(self, detail):
        super().__init__("malformed", detail)


def kind(value):
    return KINDS.get(type(value), f"a {type(value).__name__}")


def as_text(value):
    """A value as JSON, parquet's dates too. A value that could just be read may be nested too deep to be written."""
    try:
        return json.dumps(value, default=str)
    except RecursionError:
        return f"{kind(value)} nested too deep to be shown"


def one_line(error, most=120):
    return shorten(" ".join(str(error).split()), most)


def read_rows(path, split="train"):
    """Every row of the source as a Row, those that are not JSON marked malformed. Blank lines are not rows."""
    if not is_file(path):
        return numbered(hub_rows(path, split))
    readers = {".parquet": read_parquet, ".json": read_json, ".jsonl": read_jsonl}
    if (ending := next((each for each in ENDINGS if path.endswith(each)), None)) is None:
        raise InputError(
            f"{path}: expected a file that ends in .jsonl (one object per line), .json (a list) or .parquet"
        )
    try:
        return readers[ending](path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None


def numbered(values):
    return [Row(number, value) for number, value in enumerate(values, 1)]


def read_parquet(path):
    import pyarrow.parquet  # here, not above: data_prep --reuse does not need it

    try:
        return numbered(pyarrow.parquet.read_table(path).to_pylist())
    # beside arrow's own errors: strings that are not UTF-8, dates beyond Python's, unknown time zones
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise InputError(f"{path}: not a parquet file that can be read ({one_line(error)})") from None


def read_json(path):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid JSON ({one_line(error)}); if it holds one object per line, name it .jsonl"
        ) from None
    if isinstance(value, dict):  # {"data": [...]}
        tables = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        value = tables[0] if len(tables) == 1 else value
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a list of rows, or an object that holds one, found {kind(value)}")
    return numbered(value)


def read_jsonl(path):
    rows = []
    with open(path, "rb") as file, jsonlines.Reader(file, loads=parse) as reader:
        for number in range(1, sys.maxsize):
            try:
                rows.append(Row(number, reader.read(allow_none=True)))
            except EOFError:
                return rows
            except RecursionError:
                rows.append(Row(number, "", "malformed", "expected a JSON object, found one nested too deep"))
            except jsonlines.InvalidLineError as error:
                text = error.line if isinstance(error.line, str) else error.line.decode("utf-8", "replace")
                if text.strip():
                    found = one_line(error.__cause__)
                    rows.append(Row(number, text, "malformed", f"expected a JSON object, found invalid JSON ({found})"))


def parse(text):
    return json.loads(text, object_pairs_hook=each_once)


def is_file(path):
    """False for what may be the name of a data set. Raises InputError for what is neither."""
    try:
        path.encode()  # it goes into meta.json
    except UnicodeEncodeError:
        raise InputError(f"{path}: its name is not UTF-8; rename it") from None
    if os.path.isfile(path):
        return True
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; expected one file of rows, .jsonl, .json or .parquet")
    if os.path.exists(path):
        raise InputError(f"{path}: is a pipe or a device, and rows are read twice; write them to a file")
    if path.endswith(ENDINGS) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise InputError(
            f"{path}: no such file; expected rows as .jsonl, .json or .parquet, or a data set of the Hub, org/name"
        )
    return False


def hub_rows(name, split):
    """The rows of a data set of the Hub."""
    import datasets

    with downloading(f"{name} is not a file and could not be loaded from the Hub with split '{split}'"):
        return datasets.load_dataset(name, split=split)


def source_sha256(path, split="train"):
    """A value that changes when a source does: a file's hash, or a data set's fingerprint."""
    try:
        return file_sha256(path) if is_file(path) else hub_rows(path, split)._fingerprint
    except OSError as error:
        if no_room(error):
            raise
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None
