"""Hostile rows through data_prep.py: never a traceback, never a wrong result. bench/fuzz.py runs the same for long.

bash tests/run.sh tests/faults/test_fuzz_rows.py
"""

import datetime
import decimal
import gzip
import json
import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import ROOT, make_model

sys.path.insert(0, str(ROOT / "bench"))

import fuzz
from hostile import SPECIAL, Made, is_json, nested

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
GOOD = {
    "preferences": {"prompt": "How many?", "chosen": " 12", "rejected": " 11"},
    "sft": {"prompt": "How many?", "response": " 12"},
}
TASKS = pytest.mark.parametrize("task", GOOD)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [fuzz.Reader(model) for model in fuzz.make_models(tmp_path_factory.mktemp("models"))]


@pytest.fixture
def attempt(tmp_path, models):
    """attempt(source, *flags) -> what became of it, by the model without a template."""

    def run(source, *flags, reader=None):
        return fuzz.attempt(source, tmp_path / "packed", (reader or models[0]).folder, *flags)

    return run


def refused(outcome, *words):
    """A sentence that has these words; below it may stand malformed rows alone."""
    assert outcome.refused and not outcome.crash, outcome
    assert all(word in outcome.refused for word in words), outcome.refused
    assert "\n" not in outcome.refused or " rows are malformed " in outcome.refused, outcome.refused


# --- strategies ---

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)  # every code point, surrogates and NUL too
KEYS = st.sampled_from(["role", "content", "from", "value", "messages", "type", "text"]) | TEXTS
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
)
ROLE = st.sampled_from(["user", "human", "assistant", "gpt", "system", "developer", "judge", ""])
TURN = st.tuples(ROLE, TEXTS | st.sampled_from(["Q", "<|mdm_mask|>", "<|eot_id|>", " "]))


def tables(task):
    """(task, some rows of any JSON, most of it in the columns that are read)."""
    names = st.sampled_from([*GOOD[task], "system"]) | TEXTS.map(lambda name: "x" + name)
    row = (
        st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD[task], JSON | TEXTS))
        | st.dictionaries(names, JSON, max_size=4)
        | JSON
    )
    return st.tuples(st.just(task), st.lists(row, min_size=1, max_size=8))


@FEW
@given(table=st.one_of(map(tables, GOOD)), stop=st.booleans(), ending=st.sampled_from([".jsonl", ".json"]))
def test_any_json_in_any_column(attempt, models, tmp_path_factory, table, stop, ending):
    """Beside good rows, which are more, and kept."""
    task, rows = table
    # half of the rows would settle the form
    most = [GOOD[task] | {"prompt": f"How many? {number}"} for number in range(len(rows) + 1)]
    lines = [Made(json.dumps(good).encode(), parts=tuple(good.values())) for good in most]
    lines += [Made(json.dumps(value).encode(), free=True) for value in rows]
    source = tmp_path_factory.mktemp("any") / f"rows{ending}"
    texts = [row.line for row in lines]
    if ending == ".json":
        source.write_bytes(b"[" + b",".join(texts) + b"]")
        lines = lines if all(map(is_json, lines)) else None
    else:
        source.write_bytes(b"\n".join(texts))
    outcome = attempt(source, "--task", task, "--on_bad_row", "stop" if stop else "skip")
    assert not fuzz.check(lines, outcome, source, models[0], stop), outcome


@TASKS
@FEW
@given(body=st.binary(max_size=300), ending=st.sampled_from([".jsonl", ".json", ".parquet"]), good=st.booleans())
def test_any_bytes(task, attempt, tmp_path_factory, body, ending, good):
    source = tmp_path_factory.mktemp("bytes") / f"rows{ending}"
    source.write_bytes((json.dumps(GOOD[task]).encode() + b"\n" if good else b"") + body)
    outcome = attempt(source, "--task", task, "--on_bad_row", "skip")
    assert not outcome.crash, outcome
    if outcome.refused:
        assert ending != ".jsonl" or not good
        refused(outcome, str(source))
    else:
        assert list(outcome.kept) == [1] and len(outcome.listed) <= body.count(b"\n") + 1


DIALOGUES = st.tuples(st.lists(TURN, min_size=1, max_size=4), TEXTS, TEXTS)  # turns, chosen, rejected


@FEW
@given(table=st.lists(DIALOGUES, min_size=1, max_size=8))
def test_any_turns(attempt, models, tmp_path_factory, table):
    """The tokens of a dialogue decode to its messages, one turn after the other."""
    source, reader = tmp_path_factory.mktemp("turns") / "rows.jsonl", models[1]
    rows = []
    for turns, chosen, rejected in (([("user", "Q")], "good", "bad"), *table):
        prompt = [{"role": role, "content": text} for role, text in turns]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    source.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows))
    outcome = attempt(source, "--on_bad_row", "skip", reader=reader)
    assert outcome.kept and 1 in outcome.kept, outcome
    assert outcome.kept.keys() | outcome.listed.keys() == {*range(1, len(rows) + 1)}
    roles = {"human": "user", "gpt": "assistant", "developer": "system"}
    for number, ids in outcome.kept.items():
        turns = [(roles.get(turn["role"], turn["role"]), turn["content"]) for turn in rows[number - 1]["prompt"]]
        assert reader.text(ids[0].tolist()) == fuzz.rendered(turns) and not reader.masks & {*ids[0].tolist()}


@pytest.mark.parametrize("seed", [1000, 1001])
def test_a_share_of_the_long_run(tmp_path, seed):
    said = []
    counts = fuzz.run(3000, seed, tmp_path, show=said.append)
    assert not counts["tracebacks"] and not counts["wrong results"], said
    assert counts["rows tried"] >= 3000 and counts["kept"] > 500 and counts["listed: malformed"] > 300
    assert counts["listed: special token in the text"] > 50


# --- a corpus of hostile files ---


def jsonl_corpus(good):
    """{name: (bytes, lines kept, lines listed)} around a good row."""
    g = json.dumps(good).encode()
    first, *_, last = good
    other = json.dumps(good | {last: " 13"}).encode()
    many = b"".join(b', "%d": 1' % i for i in range(10**5))

    def add(extra):
        return g[:-1] + b", " + extra + b"}"

    def put(text):
        return json.dumps(good | {first: text}).encode()

    return {
        "torn at the end": (g + b"\n" + other[:-9], [1], [2]),
        "BOM and CRLF": (b"\xef\xbb\xbf" + g + b"\r\n" + other + b"\r\n", [1, 2], []),
        "files with BOMs, joined": (b"\xef\xbb\xbf" + g + b"\n\xef\xbb\xbf" + other, [1, 2], []),
        "lines ended by CR alone": (g + b"\r" + other, [], [1]),
        "UTF-16": ((g + b"\n" + other).decode().encode("utf-16"), [], [1, 2]),
        "gzip": (gzip.compress(g, mtime=0), [], [1]),
        "latin-1": (g + b"\n" + put("caf@").replace(b"@", b"\xe9") + b"\n" + put("caf\u00e9"), [1, 3], [2]),
        "a surrogate's bytes": (g + b"\n" + put("@").replace(b"@", b"\xed\xa0\x80"), [1], [2]),
        "lone surrogates": (
            g + b"\n" + put("a\ud800") + b"\n" + put("\udc00\ud800") + b"\n" + put("\U0001f600"),
            [1, 4],
            [2, 3],
        ),
        "NUL": (g + b"\n" + g.replace(b":", b"\0:", 1) + b"\n" + put("a\0b") + b"\n" + b"\0" * 1000, [1, 3], [2, 4]),
        "wrong types": (
            b"\n".join([g, put(7), put(None), put([]), put({"a": [1]}), put([[7]]), b"null", b"[]"]),
            [1],
            [*range(2, 9)],
        ),
        "keys twice": (
            g + b"\n" + add(b'"%s": "b"' % last.encode()) + b"\n" + add(b'"x": {"y": 1, "y": 2}'),
            [1],
            [2, 3],
        ),
        "numbers": (
            add(b'"x": [NaN, -Infinity, 1e999, 1e-999]')
            + b"\n"
            + put(float("nan"))
            + b"\n"
            + add(b'"x": ' + b"9" * 5000),
            [1],
            [2, 3],
        ),
        "nested lists": (add(b'"x": ' + nested(100).encode()) + b"\n" + put([[[["x"]]]]), [1], [2]),
        "brackets": (
            b"[" * 10**5 + b"\n" + g + b"\n" + b'{"x":' * 10**5 + b"\n" + add(b'"x": ' + nested(10**5).encode()),
            [2],
            [1, 3, 4],
        ),
        "columns": (g[:-1] + many + b"}\n" + other[:-1] + many + b', "7": 1}', [1], [2]),
        "huge rows": (
            g + b"\n" + put("x" * 10**6) + b"\n" + other[:-1] + b', "id": "' + b"y" * 10**6 + b'"}',
            [1, 3],
            [2],
        ),
        "nothing": (b"", [], []),
        "blank lines": (b"\n \n\t\r\n\xef\xbb\xbf\n\xe2\x80\xa8\n", [], []),
        "a prompt of blanks": (b"\n".join([g, put(" \n\t\u2003"), put("")]), [1], [2, 3]),
        "control tokens": (b"\n".join([g, *(put(f"a {token} b") for token in SPECIAL)]), [1], [2, 3, 4, 5]),
        "look-alikes": (
            b"\n".join(map(put, ("<mask", "\uff1cmask\uff1e", "< mask >", "<|mdm_mask|>"))),
            [1, 2, 3, 4],
            [],
        ),
    }


NAMES = list(jsonl_corpus(GOOD["sft"]))


@TASKS
@pytest.mark.parametrize("name", NAMES)
def test_jsonl(task, name, attempt, tmp_path):
    """Skipping, good rows are kept and the others listed; stopping, the malformed ones are counted and named."""
    body, kept, listed = jsonl_corpus(GOOD[task])[name]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(body)
    outcome = attempt(source, "--task", task, "--on_bad_row", "skip")
    if not kept:
        refused(
            outcome,
            f"{source}: holds no row that can be used",
            "it is empty" if listed == [] else f"; the first, {source}:1: expected a JSON object",
        )
    else:
        assert not outcome.crash and not outcome.refused, outcome
        assert [*outcome.kept] == kept and [*outcome.listed] == listed, outcome
    malformed = [number for number, (reason, _) in (outcome.listed or {}).items() if reason == "malformed"]
    malformed = malformed if kept else listed
    stopped = attempt(source, "--task", task)
    assert not stopped.crash, stopped.crash
    if malformed:
        refused(stopped, str(source), "(--on_bad_row skip leaves such rows out)")
        count, named = fuzz.malformed_rows(stopped.refused, source)
        assert named == malformed[:10] and count == len(malformed)


@pytest.mark.parametrize("name", ["x", "prompt", "chosen", "system", "preference"])
def test_every_depth(name, attempt, tmp_path):
    """Between what Python can read and what it can write again, too."""
    source = tmp_path / "rows.jsonl"
    ab = {"prompt": "Q", "response_a": "a", "response_b": "b", "preference": "a"}
    good = ab if name == "preference" else GOOD["preferences"]
    bad = json.dumps({**good, "prompt": " ", name: 7})  # listed in any case
    source.write_text("\n".join([json.dumps(good), *(bad.replace("7", nested(depth)) for depth in range(1, 1100, 2))]))
    outcome = attempt(source, "--on_bad_row", "skip")
    assert not outcome.crash and [*outcome.kept] == [1] and len(outcome.listed) == 550, outcome.crash


NOT_JSON = [b"", b" \n", b"[", b'[{"a": 1}', b"[" * 10**5, b'{"x":' * 10**5, b"[" + b"9" * 5000 + b"]"]
NOT_JSON += ['[{"a": 1}]'.encode("utf-16"), gzip.compress(b"[]", mtime=0)]


@pytest.mark.parametrize(
    "body, words",
    [
        *((body, "not valid JSON") for body in NOT_JSON),
        (b"7", "found a number"),
        (b"NaN", "found a number"),
        (b"{}", "row 1: expected a column 'prompt', found an empty object"),
        (b'{"a": [{}], "b": [{}]}', "no known form has these columns; the columns are a, b"),
        (b"[]", "it is empty"),
        (b"[[], 7]", "row 1: expected a JSON object, found a list"),
        (b'[{"a": 1, "a": 2}]', 'the key "a" occurs twice'),
        (b'[{"a\\nb": 1, "\\ud800": 2}]', 'the columns are "a\\nb", "\\ud800"'),
        (b'{"prompt": 1}\n{"prompt": 2}', "no known form has these columns; the columns are prompt"),
    ],
)
def test_json(body, words, attempt, tmp_path):
    (tmp_path / "rows.json").write_bytes(body)
    refused(attempt(tmp_path / "rows.json"), str(tmp_path / "rows.json"), words)


def parquet_corpus():
    """{name: (table, words of the refusal)}"""
    import pyarrow as pa

    good = {name: [text, text + "!"] for name, text in GOOD["preferences"].items()}
    torn = "not a parquet file that can be read"
    invalid = pa.array([b"\xff\xfe", b"ok"]).cast(pa.binary()).view(pa.string())
    maps = pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64()))

    def with_column(name, array):
        return pa.Table.from_pydict(good).append_column(name, array)

    return {
        "strings that are no UTF-8": (pa.Table.from_pydict(good).set_column(0, "prompt", invalid), torn),
        "one name twice": (with_column("chosen", pa.array(["a", "b"])), torn),
        "dates beyond Python's": (with_column("x", pa.array([2**62, 0], pa.timestamp("us"))), torn),
        "no such time zone": (with_column("x", pa.array([0, 0], pa.timestamp("s", "No/where"))), torn),
        "bytes for text": (
            pa.Table.from_pydict(good | {"prompt": [b"a", b"b"]}),
            "row 1: expected 'prompt' to be a string",
        ),
        "maps for text": (pa.table(good).set_column(0, "prompt", maps), "row 1: expected"),
        "no rows": (pa.Table.from_pydict({name: pa.array([], pa.string()) for name in good}), "it is empty"),
        "no columns": (pa.table({}), "it is empty"),
    }


@pytest.mark.parametrize("name", list(parquet_corpus()))
def test_parquet(name, attempt, tmp_path):
    import pyarrow.parquet

    table, words = parquet_corpus()[name]
    source = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, source)
    refused(attempt(source), str(source), words)


@pytest.mark.parametrize("cut", [0, 1, 4, 100, -1])
def test_torn_parquet(cut, attempt, tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD["preferences"]]), tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:cut])
    refused(attempt(tmp_path / "rows.parquet"), str(tmp_path / "rows.parquet"), "not a parquet file")


def test_types_that_json_lacks_beside_and_in_a_preference(attempt, tmp_path):
    import pyarrow.parquet

    row = {"prompt": "Q", "response_a": "a", "response_b": "b"}
    table = [row | {"preference": decimal.Decimal(worth), "x": datetime.time(1)} for worth in ("0.5", "1.5")] + [row]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "rows.parquet")
    refused(
        attempt(tmp_path / "rows.parquet", "--on_bad_row", "skip"),
        "2 no preference, 1 malformed",
        "'preference' is \"0.5\"",
    )


# --- what is not a file, or cannot be read ---


def test_what_is_no_file(attempt, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, target in (
        ("null.jsonl", "/dev/null"),
        ("gone.jsonl", "/nowhere"),
        ("loop.jsonl", tmp_path / "loop.jsonl"),
    ):
        (tmp_path / name).symlink_to(target)
    for name, words in (
        ("folder.jsonl", "is a folder"),
        ("pipe.jsonl", "is a pipe or a device"),
        ("null.jsonl", "is a pipe or a device"),
        ("gone.jsonl", "no such file"),
        ("loop.jsonl", "no such file"),
        ("x" * 300 + ".jsonl", "no such file"),
        ("a\0b.jsonl", "no such file"),
        (os.fsdecode(b"caf\xe9.jsonl"), "not UTF-8"),
    ):
        refused(attempt(tmp_path / name), str(tmp_path / name), words)
    refused(attempt("/dev/null"), "/dev/null: is a pipe or a device")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_a_file_that_cannot_be_read(ending, attempt, tmp_path):
    """Here one whose first page is not there, which root cannot read either."""
    (tmp_path / f"rows{ending}").symlink_to("/proc/self/mem")
    refused(attempt(tmp_path / f"rows{ending}"), f"rows{ending}: cannot be read", "Input/output error")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(attempt, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD["preferences"]))
    (tmp_path / "rows.jsonl").chmod(0)
    refused(attempt(tmp_path / "rows.jsonl"), "rows.jsonl: cannot be read", "Permission denied")


def test_a_torn_data_set_of_the_hub(attempt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "prefs").mkdir(parents=True)
    (tmp_path / "org" / "prefs" / "train.jsonl").write_text(json.dumps(GOOD["preferences"]) + '\n{"prompt": ')
    # a folder is not a name of the Hub, but `datasets` reads it like one
    monkeypatch.setattr("preferences.sources.is_file", lambda path: False)
    refused(attempt("org/prefs"), "org/prefs is not a file and could not be loaded from the Hub")


# --- rows that must not decide for others, and masks that no one wrote ---


@TASKS
def test_one_dialogue_among_strings_is_listed(task, attempt, tmp_path):
    """Without a template it is a malformed row like any other."""
    row = GOOD[task] | {"prompt": [{"role": "user", "content": "x"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD[task]) + "\n" + json.dumps(row))
    outcome = attempt(tmp_path / "rows.jsonl", "--task", task, "--on_bad_row", "skip")
    reason, detail = outcome.listed[2]
    assert [*outcome.kept] == [1] and reason == "malformed" and "need a chat template" in detail


@pytest.mark.parametrize(
    "task, stray, words",
    [
        (
            "preferences",
            {"input": "i", "preferred_output": "p", "non_preferred_output": "n"},
            "expected a column 'prompt'",
        ),
        ("sft", {"prompt": "p", "response": "r", "passage": "c"}, "nothing reads passage (text), which would be lost"),
        ("sft", {"prompt": "p", "completion": "c"}, "expected a column 'response'"),
    ],
)
def test_a_stray_row_does_not_decide_the_form(task, stray, words, attempt, tmp_path):
    """It is the one that is listed, and named where the job stops; half of the rows are no strays."""
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in (GOOD[task], stray, GOOD[task] | {"prompt": "Q"})))
    refused(attempt(source, "--task", task), f"{source}:2: {words}")
    outcome = attempt(source, "--task", task, "--on_bad_row", "skip")
    assert [*outcome.kept] == [1, 3] and outcome.listed[2][0] == "malformed"
    source.write_text("\n".join(json.dumps(row) for row in (GOOD[task], GOOD[task] | {"prompt": "Q", "passage": "c"})))
    refused(attempt(source, "--task", task, "--on_bad_row", "skip"), f"{source}: nothing reads passage (text)")


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_mask_that_the_tokenizer_reads_into_a_text(column, tiny_dir, tmp_path):
    """A unigram tokenizer holds its special tokens as pieces, and NFKC writes full-width letters as plain ones."""
    import tokenizers
    import transformers

    letters = [(letter, -5.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyzHQ<>/?!12 "]
    special = [(token, 0.0) for token in ("<unk>", "<s>", "</s>", "<mask>")]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([*special, *letters], unk_id=0))
    unigram.normalizer = tokenizers.normalizers.NFKC()
    model = make_model(tmp_path / "model", tiny_dir)
    for path in model.glob("token*"):
        path.unlink()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=unigram, unk_token="<unk>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    ).save_pretrained(model)
    good = {"prompt": "how many", "chosen": "twelve", "rejected": "ten"}
    rows = [good, *(good | {column: f"a {text} b"} for text in ("\uff1cmask\uff1e", "<mask\uff1e", "<mask>"))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcome = fuzz.attempt(tmp_path / "rows.jsonl", tmp_path / "packed", model)
    assert [*outcome.kept] == [1], outcome
    assert {reason for reason, _ in outcome.listed.values()} == {"special token in the text"}, outcome
    assert outcome.meta["mask_token_id"] == 3 and not any(3 in part for part in outcome.kept[1])
