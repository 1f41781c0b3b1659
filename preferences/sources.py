"""Where rows come from: .jsonl, .json, .parquet or .arrow files, or a data set of the Hub ("org/name").

Every row of a source becomes a Row. A row that is not JSON is marked malformed, so that it can be listed with its line.
Messages that are written as JSON, in a column of texts or in a Json feature of `datasets`, are read. A source that
cannot be read is refused. forms.py and rows.py say what a row must hold.
"""

import glob
import itertools
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonlines

from files import InputError, each_once, file_sha256, fingerprint, no_room, shorten
from models.folders import downloading
from preferences.written import Unlike, is_messages, read_messages

ENDINGS = (".jsonl", ".json", ".parquet", ".arrow")
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
    label: bool | None = None  # of --task kto: whether the response is desirable
    source: str = ""  # the file
    is_line: bool = False  # whether number is a line of it

    @property
    def place(self):
        """Where the row is, with its file."""
        return f"{self.source}:{self.number}" if self.is_line else f"{self.source}: row {self.number}"

    @property
    def spot(self):
        """Where the row is in its file."""
        return f"{'line' if self.is_line else 'row'} {self.number}"

    def leave_out(self, reason, detail=""):
        self.reason, self.detail = reason, detail


class LeftOut(Exception):
    """LeftOut(reason, detail): a row is not packed. The reason is counted, the detail is listed."""


class Malformed(LeftOut):
    """Malformed("expected ..., found ..."): a row is not of the form of its file."""

    def __init__(self, detail):
        super().__init__("malformed", detail)


def kind(value):
    if isinstance(value, Unlike):
        return value.found
    return KINDS.get(type(value), f"a {type(value).__name__}")


def as_text(value):
    """A value as JSON, parquet's dates too. A value that could just be read may be nested too deep to be written."""
    try:
        return json.dumps(value, default=str)
    except RecursionError:
        return f"{kind(value)} nested too deep to be shown"


def one_line(error, most=120):
    return shorten(" ".join(str(error).split()), most)


def find(words):
    """The files and data sets that the words of --in name; data-*.parquet is a pattern unless it is a file's name."""
    paths = []
    for word in words:
        matching = sorted(glob.glob(word)) if glob.has_magic(word) and not os.path.exists(word) else [word]
        if not matching:
            raise InputError(f"{word}: no file matches this pattern")
        paths += matching
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise InputError(f"{twice}: named twice by --in, and each of its rows would be a duplicate")
    for path in paths:
        is_file(path)
    return paths


def described(paths):
    """What messages call several sources."""
    return paths[0] if len(paths) == 1 else shorten(f"{len(paths)} files ({', '.join(paths)})", 300)


def read_rows(paths, split="train"):
    """Every row of the sources as a Row, those that are not JSON marked malformed. Blank lines are not rows."""
    rows = []
    for path in paths:
        found = read_source(path, split)
        for row in found:
            row.source = path
        rows += found
    read_messages([row.value for row in rows if isinstance(row.value, dict)])
    return rows


def read_source(path, split):
    if not is_file(path):
        return numbered(hub_rows(path, split))
    if (ending := next((each for each in ENDINGS if path.endswith(each)), None)) is None:
        raise InputError(
            f"{path}: expected a file that ends in .jsonl (one object per line), .json (a list), .parquet or .arrow"
        )
    try:
        return read_json(path, ending) if ending.startswith(".json") else read_arrow(path, ending)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None


def numbered(values):
    return [Row(number, value) for number, value in enumerate(values, 1)]


# --- JSON ---


def read_json(path, ending):
    """The rows of a file of one object a line, or of one list. The first line tells which, whatever the name says."""
    with open(path, "rb") as file:
        lines = list(itertools.islice((line for line in file if line.strip()), 2))
    begins_with_a_row = isinstance(parsed(*lines[:1]), dict)
    if begins_with_a_row and (ending == ".jsonl" or len(lines) > 1):
        return read_lines(path)
    content = Path(path).read_bytes()
    if ending == ".jsonl":
        value = parsed(content)
        return numbered(rows_in(value)) if isinstance(value, dict) or is_table(value) else read_lines(path)
    try:
        value = parse(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid JSON ({one_line(error)}); expected a list of rows, or one object a line"
        ) from None
    if not isinstance(value, (list, dict)):
        raise InputError(f"{path}: expected a list of rows, or an object that holds one, found {kind(value)}")
    return numbered(rows_in(value))


def rows_in(value):
    """The rows of a list, of an object such as {"version": 1, "data": [...]}, or of an object that is the only row."""
    if isinstance(value, list):
        return value
    tables = [each for each in value.values() if is_table(each)]
    return tables[0] if len(tables) == 1 else [value]


def is_table(value):
    """Whether a value is a list of rows, and not one of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not is_messages(value)


def read_lines(path):
    rows = []
    with open(path, "rb") as file, jsonlines.Reader(file, loads=parse) as reader:
        for number in range(1, sys.maxsize):
            try:
                rows.append(Row(number, reader.read(allow_none=True), is_line=True))
            except EOFError:
                return rows
            except RecursionError:
                too_deep = "expected a JSON object, found one nested too deep"
                rows.append(Row(number, "", "malformed", too_deep, is_line=True))
            except jsonlines.InvalidLineError as error:
                text = error.line if isinstance(error.line, str) else error.line.decode("utf-8", "replace")
                if text.strip():
                    found = one_line(error.__cause__)
                    detail = f"expected a JSON object, found invalid JSON ({found})"
                    rows.append(Row(number, text, "malformed", detail, is_line=True))


def parse(text):
    return json.loads(text, object_pairs_hook=each_once)


def parsed(content=b""):
    """The value of JSON as bytes, None where it is none."""
    try:
        return parse(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


# --- tables of Arrow ---


def read_arrow(path, ending):
    """The rows of a .parquet file, or of an .arrow file of `datasets`; Json features as load_dataset gives them."""
    import pyarrow.parquet  # here, not above: data_prep --reuse does not need it

    try:
        if ending == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            with open(path, "rb") as file:
                begins = file.read(6)
            open_arrow = pyarrow.ipc.open_file if begins == b"ARROW1" else pyarrow.ipc.open_stream
            table = open_arrow(path).read_all()
        rows = table.to_pylist()
        has_json = "arrow.json" in str(table.schema)
        return numbered(decoded(row, table.schema) for row in rows) if has_json else numbered(rows)
    # beside arrow's own errors: strings that are not UTF-8, dates beyond Python's, unknown time zones
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise InputError(f"{path}: not a {ending[1:]} file that can be read ({one_line(error)})") from None


def decoded(row, fields):
    """A struct with its values of Arrow's JSON type read. fields: the struct's fields."""
    return {field.name: decoded_value(row[field.name], field.type) for field in fields}


def decoded_value(value, arrow_type):
    if value is None:
        return None
    if str(arrow_type) == "extension<arrow.json>":
        return json.loads(value)
    if str(arrow_type).startswith("struct"):
        return decoded(value, arrow_type)
    if str(arrow_type).startswith(("list", "large_list")):
        return [decoded_value(each, arrow_type.value_type) for each in value]
    return value


def is_file(path):
    """False for what may be the name of a data set. Raises InputError for what is neither."""
    try:
        path.encode()  # it goes into meta.json
    except UnicodeEncodeError:
        raise InputError(f"{path}: its name is not UTF-8; rename it") from None
    if os.path.isfile(path):
        return True
    if os.path.isdir(path):
        raise InputError(
            f"{path}: is a folder; expected files of rows, such as '{os.path.join(path, '*.jsonl')}' (.json, .parquet, "
            ".arrow)"
        )
    if os.path.exists(path):
        raise InputError(f"{path}: is a pipe or a device, and rows are read twice; write them to a file")
    if path.endswith(ENDINGS) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise InputError(
            f"{path}: no such file; expected rows as .jsonl, .json, .parquet or .arrow, "
            "or a data set of the Hub, org/name"
        )
    return False


def hub_rows(name, split):
    """The rows of a data set of the Hub."""
    import datasets

    with downloading(f"{name} is not a file and could not be loaded from the Hub with split '{split}'"):
        return datasets.load_dataset(name, split=split)


def source_sha256(paths, split="train"):
    """A value that changes when the sources do: a file's hash, a data set's fingerprint, or the hash of several."""
    values = [sha256_of(path, split) for path in paths]
    return values[0] if len(values) == 1 else fingerprint(*values)


def sha256_of(path, split):
    try:
        return file_sha256(path) if is_file(path) else hub_rows(path, split)._fingerprint
    except OSError as error:
        if no_room(error):
            raise
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None
