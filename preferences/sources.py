"""Where rows come from: a .jsonl, .json or .parquet file, or a data set of the hub ("org/name"), through `datasets`.

Every row of a source becomes a Row; one that is no JSON is marked malformed, so that it can be listed with its line. What cannot
be read at all is refused in one sentence. What a row must hold is rows.py's and demonstrations.py's.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonlines

from files import InputError, each_once, file_sha256, shorten

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
    parts: tuple = ()  # prompt (a string or messages), chosen, rejected
    ids: tuple = ()  # the same as arrays of ids, uint32


def kind(value):
    return KINDS.get(type(value), f"a {type(value).__name__}")


def as_text(value):
    """A value as JSON, parquet's dates too. One that was nested almost too deep to be read may be too deep to be written."""
    try:
        return json.dumps(value, default=str)
    except RecursionError:
        return f"{kind(value)} nested too deep to be shown"


def said_of(error):
    return shorten(" ".join(str(error).split()), 120)


def read_rows(path, split="train"):
    """Every row of the source as a Row, those that are not JSON marked malformed; blank lines are no rows."""
    if not is_file(path):
        return [Row(number, value) for number, value in enumerate(hub_rows(path, split), 1)]
    readers = {".parquet": read_parquet, ".json": read_json, ".jsonl": read_jsonl}
    if (ending := next((each for each in ENDINGS if path.endswith(each)), None)) is None:
        raise InputError(f"{path}: expected a file that ends in .jsonl (one object a line), .json (a list) or .parquet")
    try:
        return readers[ending](path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({said_of(error)})") from None


def read_parquet(path):
    import pyarrow.parquet  # here, not above: data_prep --reuse has no need of it

    try:
        return [Row(number, value) for number, value in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)]
    # beside arrow's own errors: strings that are no UTF-8, dates beyond Python's, time zones that are none
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise InputError(f"{path}: not a parquet file that can be read ({said_of(error)})") from None


def read_json(path):
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid JSON ({said_of(error)}); call a file of one object a line .jsonl"
        ) from None
    if (
        isinstance(values, dict)
        and len(
            lists := [each for each in values.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        )
        == 1
    ):
        [values] = lists  # {"data": [...]}
    if not isinstance(values, list):
        raise InputError(f"{path}: expected a list of rows, or an object that holds one, found {kind(values)}")
    return [Row(number, value) for number, value in enumerate(values, 1)]


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
                    found = said_of(error.__cause__)
                    rows.append(Row(number, text, "malformed", f"expected a JSON object, found invalid JSON ({found})"))


def parse(text):
    return json.loads(text, object_pairs_hook=each_once)


def is_file(path):
    """False for what can be the name of a data set; refuses what is neither."""
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
            f"{path}: no such file; expected rows as .jsonl, .json or .parquet, or a data set of the hub, org/name"
        )
    return False


def hub_rows(name, split):
    """The rows of a data set of the hub."""
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{name}: neither a file nor a data set of the hub with a split '{split}' that can be read "
            f"({shorten(' '.join(str(error).split()), 200)})"
        ) from None


def source_sha256(path, split="train"):
    """What tells whether a source has changed: a file's hash, or a data set's fingerprint."""
    try:
        return file_sha256(path) if is_file(path) else hub_rows(path, split)._fingerprint
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({said_of(error)})") from None
