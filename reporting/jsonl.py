"""Lines of .jsonl files whose writer may have been killed: what is not a JSON object is left out."""

import json
import mmap


def parsed(line):
    """The JSON object of a line, None if it is not one: a process that was killed leaves half a line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def rows_of(path):
    """The JSON objects of a .jsonl file's lines; none if there is no such file."""
    if path.is_file():
        with open(path, "rb") as file:
            yield from (row for row in map(parsed, file) if row is not None)


def lines_backwards(path):
    """The lines of a file, as bytes, the last first: what a report needs is near the end."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            end = len(view)
            while end > 0:
                start = view.rfind(b"\n", 0, end) + 1
                yield view[start:end]
                end = start - 1
