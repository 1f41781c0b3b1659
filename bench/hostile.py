"""Files of hostile rows, each row with what must become of it. For fuzz.py and the tests.

Rows are of the forms of preferences/forms.py. Their texts are odd (control tokens, NUL, surrogates, look-alikes), and
half of them are spoilt: torn, of wrong types, in other encodings, nested, with keys twice. Or all rows of a file have
an Extra: a column or field that no form reads, or messages written as JSON. All comes from one random.Random.
"""

import datetime
import decimal
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass

HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mdm_mask|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}"
)
SPECIAL = ["<mask>", "</s>", "<s>", "<unk>"]
PLAIN = [
    "seven pens",
    "7 + 5 = 12",
    "\n#### 12",
    "  ",
    "\t",
    "caf\u00e9 \u6f22\u5b57",
    "\U0001f600",
    "\0",
    "\u2028",
    "\u200b",
    "\ufeff",
    "e\u0301",
    "\u202e",
    "\ufb01",
    "\r\n",
    "{{ x }}",
    "{% if %}",
    "%s",
    "\\n",
    "[INST]",
    "\x7f\x85",
    "\ufffd",
    "\uffff",
    "\U0010ffff",
    "\x1b[31m",
    "'\"",
    "<0x0A>",
    "<mask",
    "mask>",
    "< mask>",
    "<MASK>",
    "\uff1cmask\uff1e",
    "<ma\u200bsk>",
    "<|mdm_mask |>",
    "<|eot_id",
    "|>",
    '{"prompt": 1}',
    "\n\n",
]
WRONG = [
    None,
    7,
    True,
    float("nan"),
    float("inf"),
    10**400,
    [],
    {},
    [7],
    [[]],
    {"a": 1},
    [{"role": "user"}],
    [None],
    [{"role": 5, "content": "x"}],
    [{"role": "judge", "content": "x"}],
    [{"role": "user", "content": {"a": [1]}}],
    [{"role": "user", "content": [{"type": "image"}]}],
    {"messages": {"messages": []}},
    {"messages": "x"},
    {"role": ["user"]},
]
NO_ROWS = [b"null", b"7", b"NaN", b'"x"', b"[]", b"{}", b"true", b"[{}]", b"-", b"\0", b"{"]
STRAY = [  # rows of other forms, which must not decide the file's
    dict.fromkeys(("input", "preferred_output", "non_preferred_output")),
    dict.fromkeys(("prompt", "completion", "label")),
    dict.fromkeys(("instruction", "chosen")),
    {"text": None},
]
MOST = 400  # --max_length


@dataclass
class Made:
    """A line of a file and what must become of it."""

    line: bytes
    reasons: frozenset = frozenset()  # why it may be left out; none: it must be kept, but for a duplicate
    free: bool = False  # a change whose outcome is not foreseen: it may be kept or listed
    parts: tuple = ()  # prompt and responses, which the tokens of a kept row must say; (): some strings of the row
    blank: bool = False  # no row at all


# --- rows ---


def text(rng, odd):
    """A text; odd: of strange pieces, perhaps with a special token or a lone surrogate."""
    if not odd:
        return f"{rng.choice(PLAIN[:3])} {rng.randrange(10**6)}"
    pieces = rng.choices(PLAIN, k=rng.randrange(1, 7))
    if rng.random() < 0.1:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice([*SPECIAL, *HEADERS, "\ud800", "\udfff"]))
    return "".join(pieces * (100 if rng.random() < 0.02 else 1))


def turn(role, content):
    return {"role": role, "content": content}


def whole(prompt, response):
    return [turn("user", prompt), turn("assistant", response)]


# name: (columns, row of (prompt, chosen, rejected)); those of the second half are messages, which need a template
FORMS = {
    ("preferences", False): [
        (("prompt", "chosen", "rejected"), lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r}),
        (("question", "response_j", "response_k"), lambda p, c, r: {"question": p, "response_j": c, "response_k": r}),
        (
            ("instruction", "chosen", "rejected"),
            lambda p, c, r: {"instruction": p, "input": None, "chosen": c, "rejected": r},
        ),
        (
            ("prompt", "response_a", "response_b"),
            lambda p, c, r: {"prompt": p, "response_a": r, "response_b": c, "preference": "B"},
        ),
    ],
    ("preferences", True): [
        (
            ("prompt", "chosen", "rejected"),
            lambda p, c, r: {
                "prompt": [turn("user", p)],
                "chosen": [turn("assistant", c)],
                "rejected": [turn("assistant", r)],
            },
        ),
        (("chosen", "rejected"), lambda p, c, r: {"chosen": whole(p, c), "rejected": whole(p, r)}),
        (
            ("input", "preferred_output", "non_preferred_output"),
            lambda p, c, r: {
                "input": {"messages": [turn("user", p)]},
                "preferred_output": [turn("assistant", c)],
                "non_preferred_output": [turn("assistant", r)],
            },
        ),
    ],
    ("sft", False): [
        (("prompt", "response"), lambda p, c: {"prompt": p, "response": c}),
        (("instruction", "output"), lambda p, c: {"instruction": p, "input": "", "output": c}),
    ],
    ("sft", True): [
        (("messages",), lambda p, c: {"messages": whole(p, c)}),
        (
            ("conversations",),
            lambda p, c: {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": c}]},
        ),
    ],
}


def reasons_of(parts, chat):
    """Why a row of these texts may not be kept."""
    joined, found = "".join(parts), set()
    if any(0xD800 <= ord(letter) < 0xE000 for letter in joined):
        return frozenset({"malformed"})
    if not parts[0].strip():
        found.add("empty prompt")
    if not all(part.strip() for part in parts[1:]):
        found.add("empty response")
    if any(token in part for token in (*SPECIAL, *(HEADERS if chat else ())) for part in parts):
        found.add("special token in the text")
    if len({decoded(part, chat) for part in parts[1:]}) < len(parts) - 1:
        found.add("chosen equals rejected")
    if len(joined.encode()) > MOST - 50:  # a token is a byte at least, and the template takes some
        found.add("too long")
    return frozenset(found)


def decoded(part, chat):
    """A text as its tokens give it back: the template strips it, and sentencepiece reads U+2581 as a space."""
    return (part.strip() if chat else part).replace("\u2581", " ")


def nested(depth):
    return "[" * depth + "]" * depth


def spoil(rng, row, line, columns, chat):
    """(line, outcome): a good row spoilt. outcome: "bad" (malformed), "free", or "good" (kept as it was)."""
    key, more = rng.choice(columns), line[:-1]

    def changed(**values):
        return json.dumps(row | values).encode()

    ways = {
        "cut": lambda: (line[: rng.randrange(1, len(line) - 1)], "bad"),
        "type": lambda: (changed(**{key: rng.choice(WRONG)}), "bad"),
        "missing": lambda: (json.dumps({name: row[name] for name in row if name != key}).encode(), "bad"),
        "twice": lambda: (more + f', "{key}": "again"}}'.encode(), "bad"),
        "no object": lambda: (rng.choice(NO_ROWS), "bad"),
        "two": lambda: (line + b" " + line, "bad"),
        "repr": lambda: (repr(row).encode("utf-8", "replace"), "bad"),
        "comma": lambda: (more + b",}", "bad"),
        "latin-1": lambda: (more + ', "x": "caf\u00e9"}'.encode("latin-1"), "bad"),
        "UTF-16": lambda: (line.decode().encode("utf-16"), "bad"),
        "gzip": lambda: (gzip.compress(line, mtime=0).replace(b"\n", b""), "bad"),
        "raw NUL": lambda: (line.replace(b": ", b": \0", 1), "bad"),
        "deep": lambda: (rng.choice([b"[" * 10**5, b'{"a":' * 10**5, nested(5000).encode()]), "bad"),
        "digits": lambda: (more + b', "x": ' + b"9" * 5000 + b"}", "bad"),
        "system": lambda: (changed(system=rng.choice([7, ["S"], {"a": 1}])), "bad"),
        "stray": lambda: (json.dumps(rng.choice(STRAY)).encode(), "bad"),
        "flip": lambda: (flipped(rng, line), "free"),
        "nested": lambda: (more + f', "x": {nested(rng.randrange(2, 1200))}}}'.encode(), "free"),
        "CR": lambda: (line + b"\r", "good"),
        "BOM": lambda: (b"\xef\xbb\xbf" + line, "good"),
        "numbers": lambda: (more + b', "x": [NaN, -Infinity, 1e999, -0.0, 123456789012345678901234567890]}', "good"),
        "columns": lambda: (more + many_columns(rng.choice([10, 100, 1000])) + b"}", "good"),
    }
    if "instruction" in row:
        ways["input"] = lambda: (changed(input=rng.choice([7, 0, ["x"], {"a": 1}])), "bad")
        wrong = [7, ["ab"], {"ab": 1}, [["a"]], [["a", 1]]]
        ways["history"] = lambda: (changed(history=rng.choice(wrong)), "bad")
    return ways[rng.choice(list(ways))]()


def many_columns(count):
    return b"".join(b', "%d": %d' % (number, number) for number in range(count))


def flipped(rng, line):
    place = rng.randrange(len(line))
    return (line[:place] + bytes([rng.randrange(256)]) + line[place + 1 :]).replace(b"\n", b" ")


def make_row(rng, task, columns, build, chat, plain=False):
    """One Made; plain: nothing is wrong with it."""
    odd = not plain and rng.random() < 0.6
    parts = tuple(text(rng, odd) for _ in range(2 if task == "sft" else 3))
    if not plain and rng.random() < 0.02:
        parts = (parts[0], *parts[1:2] * (len(parts) - 1))  # chosen equals rejected
    row, reasons = build(*parts), reasons_of(parts, chat)
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if b"\xed\xa0\x80" in line or b"\xed\xbf\xbf" in line:
        line = json.dumps(row).encode()
    if plain or rng.random() < 0.5:
        return Made(line, reasons, parts=parts)
    line, outcome = spoil(rng, row, json.dumps(row).encode(), columns, chat)
    if outcome == "bad":
        return Made(line, frozenset({"malformed"}))
    return Made(line, reasons, outcome == "free", parts if outcome == "good" else ())


# --- columns and fields beside those of a form ---


UNREAD = ["notes", "explanation", "passage", "premise", "transcript", "reference_solution", "hint", "followUp", "extra"]
HARMLESS = ["id", "source", "model", "language", "created_at", "topic", "split", "prompt_id", "messageTree_id"]
PARTS = ["context", "history", "system", "system_prompt", "system_message"]
MEDIA = ["image", "images", "video", "audio", "tools", "functions"]


@dataclass
class Extra:
    """What every row of a file has besides. becomes: "refused", "listed", "prompt" (a part of it) or "same"."""

    name: str
    becomes: str
    add: Callable  # row -> (row, the text that was added)


def make_extra(rng, has_messages):
    """A random Extra."""

    def column(name, value):
        return lambda row: (row | {name: (made := value())}, made)

    def sentence():
        return f"{text(rng, False)}. That is said {rng.randrange(10**6)} times."

    def call():
        return [{"name": "add", "arguments": {"question": sentence()}}]

    kinds = {
        "unread": lambda name: Extra(name, "refused", column(name, sentence)),
        "dialogue": lambda name: Extra(name, "refused", column(name, lambda: whole(sentence(), sentence()))),
        "media": lambda name: Extra(name, "refused", column(name, call)),
        "harmless": lambda name: Extra(name, "listed", column(name, lambda: f"x-{rng.randrange(10**6)}")),
        "part": lambda name: Extra(name, "prompt", column(name, sentence)),
    }
    names = {"unread": UNREAD, "dialogue": UNREAD, "media": MEDIA, "harmless": HARMLESS, "part": PARTS}
    if has_messages:
        kinds["field"] = lambda name: Extra(name, "refused", lambda row: (in_messages(row, {name: call()}), ""))
        kinds["as JSON"] = lambda name: Extra(name, "same", lambda row: (as_strings(row), ""))
        names |= {"field": ["tool_calls", "function_call", "images"], "as JSON": [""]}
    kind = rng.choice(list(kinds))
    return kinds[kind](rng.choice(names[kind]))


def in_messages(value, fields):
    """A row with `fields` in the last of every list of messages."""
    if isinstance(value, dict):
        return {name: in_messages(each, fields) for name, each in value.items()}
    return [*value[:-1], value[-1] | fields] if isinstance(value, list) and value else value


def as_strings(row):
    """A row whose messages are written as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


def with_extra(made, extra):
    """(Made, text): a row that is not spoilt, with an Extra, and the text that it adds."""
    row, added = extra.add(json.loads(made.line))
    return Made(json.dumps(row).encode(), made.reasons, parts=made.parts), added


# --- files ---


def make_jsonl(rng, path, made):
    """Write the rows with blank lines between them; the lines of the file, those without a row too."""
    lines = []
    for row in made:
        if rng.random() < 0.05:
            lines.append(Made(rng.choice([b"", b" ", b"\t ", b"\r", b"\xef\xbb\xbf", b"\xe2\x80\xa8"]), blank=True))
        lines.append(row)
    mark = b"\xef\xbb\xbf" if rng.random() < 0.1 and not lines[0].blank else b""
    path.write_bytes(mark + b"\n".join(row.line for row in lines) + rng.choice([b"", b"\n", b"\r\n\n"]))
    return lines


def is_json(row):
    try:
        json.loads(row.line.decode("utf-8-sig"))
        return b': "again"' not in row.line and nested(700).encode() not in row.line  # a list around it is one deeper
    except (ValueError, RecursionError):
        return False


def make_json(rng, path, made):
    """A list of the rows that are JSON; now and then of all, and the file cannot be read: no rows, then."""
    torn = rng.random() < 0.1
    lines = made if torn else [row for row in made if is_json(row)]
    body = b"[" + b",\n".join(row.line.removeprefix(b"\xef\xbb\xbf") for row in lines) + b"]"
    path.write_bytes(body if rng.random() < 0.5 else b'{"version": [1], "data": ' + body + b"}")
    return lines if all(map(is_json, lines)) else None


def make_parquet(rng, path, made):
    """The rows that are not spoilt, some with a null; beside them columns of types that JSON lacks."""
    import pyarrow
    import pyarrow.parquet

    lines, table = [], []
    for made_row in (row for row in made if row.parts and "malformed" not in row.reasons and len(row.line) < 5000):
        row = json.loads(made_row.line.decode("utf-8-sig"))
        row = {name: value for name, value in row.items() if name != "x" and not name.isdigit()}
        if lines and rng.random() < 0.1:
            row[next(iter(row))], made_row = None, Made(made_row.line, frozenset({"malformed"}))
        table.append(row | {"when": datetime.datetime(2026, 1, 2), "worth": decimal.Decimal("0.50")})
        lines.append(made_row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return lines


MAKERS = {".jsonl": make_jsonl, ".json": make_json, ".parquet": make_parquet}
