"""Tests of preferences/sources.py, forms.py and rows.py: every source and form of preferences, through data_prep.py.

bash tests/run.sh tests/preferences/test_rows.py
"""

import json
import resource

import pytest
from small import call, refusal

import data_prep
import files
from files import InputError
from models import tokenization
from preferences import forms, packed, rows
from preferences.sources import Row, find, read_rows

USER = [{"role": "user", "content": "Q"}]
AB = {"question": "Q", "response_a": "first", "response_b": "second"}
WANTED = (USER, ["good", "bad"])
SYSTEM = [{"role": "system", "content": "S"}, *USER]


def said(text):
    """A response as messages."""
    return [{"role": "assistant", "content": text}]


FORMS = {  # name in what is printed: (row, (prompt, [chosen, rejected]))
    "prompt, chosen, rejected": ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, ("Q", ["good", "bad"])),
    "conversations, chosen, rejected": (  # LLaMA-Factory
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        WANTED,
    ),
    "instruction, chosen, rejected": (  # LLaMA-Factory
        {"instruction": "Add.", "input": "1 2", "chosen": "good", "rejected": "bad"},
        ("Add.\n1 2", ["good", "bad"]),
    ),
    "input, preferred_output, non_preferred_output": (  # OpenAI
        {
            "input": {"messages": USER, "tools": []},
            "preferred_output": said("good"),
            "non_preferred_output": said("bad"),
        },
        WANTED,
    ),
    "question, chosen, rejected": (
        {"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"},
        (SYSTEM, ["good", "bad"]),
    ),
    "question, response_j, response_k": (
        {"question": "Q", "response_j": "good", "response_k": "bad"},
        ("Q", ["good", "bad"]),
    ),
    "input, chosen, rejected": (  # Orca pairs
        {"system": "S", "input": "Q", "chosen": "good", "rejected": "bad"},
        (SYSTEM, ["good", "bad"]),
    ),
    "chosen, rejected": ({"chosen": USER + said("good"), "rejected": USER + said("bad")}, WANTED),
    "A/B (response_a, response_b, preferred by preference)": ({**AB, "preference": "B"}, ("Q", ["second", "first"])),
    "A/B (output_1, output_2, preferred by preference)": (  # AlpacaFarm
        {"instruction": "Sort.", "input": "2 1", "output_1": "first", "output_2": "second", "preference": 1.0},
        ("Sort.\n2 1", ["first", "second"]),
    ),
    "A/B (conversation_a, conversation_b, preferred by winner)": (  # Chatbot Arena
        {"conversation_a": USER + said("first"), "conversation_b": USER + said("second"), "winner": "model_b"},
        (USER, ["second", "first"]),
    ),
}


def prep(source, out, model, *more):
    call(data_prep.main, "--in", source, "--out", out, "--model_name_or_path", model, "--max_length", 8192, *more)
    meta = files.read_json(out / "meta.json", "")
    listed = (out / "rejects.jsonl").read_text().splitlines()
    assert meta["rows"] == meta["kept"] + len(listed) and sum(meta["dropped"].values()) == len(listed)
    return meta, [json.loads(line) for line in listed]


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, chat_dir, tmp_path, capsys):
    """Named in the output and in meta.json; as .jsonl, .json, {"data": [...]} and .parquet the same arrays."""
    row, want = FORMS[form]
    table = [Row(1, row)]
    columns, found = forms.find_columns("preferences", table, {}, "x")
    assert found == form and rows.preference(row, columns, True) == want
    other = json.loads(json.dumps(row).replace("good", "very good").replace("first", "the first"))
    sources = {name: tmp_path / name for name in ("a.jsonl", "a.json", "b.json", "a.parquet")}
    sources["a.jsonl"].write_text(json.dumps(row) + "\n\n" + json.dumps(other) + "\n")
    sources["a.json"].write_text(json.dumps([row, other]))
    sources["b.json"].write_text(json.dumps({"version": 1, "data": [row, other], "columns": list(row)}))
    import pyarrow
    import pyarrow.parquet

    plain = [dict(row), dict(other)]
    for each in plain:
        if isinstance(each.get("input"), dict):
            each["input"] = {"messages": USER}  # no "tools": parquet has no list of unknown type
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), sources["a.parquet"])
    made = set()
    for name, source in sources.items():
        meta, listed = prep(source, tmp_path / "out" / name, chat_dir)
        assert meta["form"] == form and meta["kept"] == 2 and not listed
        assert f"form: {form}\n" in capsys.readouterr().out
        made.add(tuple((tmp_path / "out" / name / file).read_bytes() for file in ("tokens.npy", "bounds.npy")))
    assert len(made) == 1


@pytest.mark.parametrize(
    "names, value, chosen",
    [
        (("response_a", "response_b"), "a", 0),
        (("response_A", "response_B"), "b", 1),
        (("answer_a", "answer_b"), "answer_b", 1),
        (("response_0", "response_1"), 0, 0),
        (("response_0", "response_1"), True, 1),
        (("output_1", "output_2"), 2, 1),
        (("completion_1", "completion_2"), "1", 0),
        (("human_ref_A", "human_ref_B"), 1, 0),
        (("human_ref_A", "human_ref_B"), 0, 1),
    ],
)
def test_ab(names, value, chosen):
    row = {"prompt": "Q", names[0]: "first", names[1]: "second", "preference": value}
    columns, _ = forms.find_columns("preferences", [Row(1, row)], {}, "x")
    assert rows.preference(row, columns, False) == ("Q", [["first", "second"], ["second", "first"]][chosen])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"chosen": USER + said("good"), "rejected": USER + said("bad")},
        {"conversations": USER, "chosen": said("good")[0], "rejected": said("bad")[0]},
        {"prompt": "Q", "response_a": "good", "response_b": "bad", "winner": "model_a"},
    ],
    ids=list,
)
def test_a_system_column_is_part_of_every_forms_prompt(row):
    for system, prompts in (("S", [SYSTEM]), (" ", ["Q", USER]), (None, ["Q", USER])):
        columns, _ = forms.find_columns("preferences", [Row(1, row | {"system": system})], {}, "x")
        prompt, responses = rows.preference(row | {"system": system}, columns, True)
        assert responses == ["good", "bad"] and prompt in prompts
    own = {"prompt": [{"role": "system", "content": "own"}, *USER], "chosen": "good", "rejected": "bad", "system": "S"}
    assert rows.preference(own, {name: name for name in ("prompt", "chosen", "rejected")}, True)[0] == own["prompt"]


def test_history_is_part_of_the_prompt():
    row = {
        "instruction": "And 3?",
        "input": "",
        "history": [["1?", "one"], ["2?", "two"]],
        "chosen": "good",
        "rejected": "bad",
    }
    columns, form = forms.find_columns("preferences", [Row(1, row)], {}, "x")
    prompt, *_ = rows.preference(row, columns, True)
    assert form == "instruction, chosen, rejected"
    assert [each["content"] for each in prompt] == ["1?", "one", "2?", "two", "And 3?"] and prompt[-1]["role"] == "user"
    with pytest.raises(rows.Malformed) as error:
        rows.preference(row | {"history": [["1?"]]}, columns, True)
    assert "expected 'history' to be a list of" in error.value.args[1]


def test_a_prompt_under_another_name_is_not_thrown_away(tmp_path, tiny_dir, capsys):
    """Chosen and rejected that happen to begin alike are no dialogues: how they begin is no prompt."""
    row = {"user_prompt": "Q", "chosen": " 7 + 5 = 12", "rejected": " 7 + 5 = 13"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["--in", tmp_path / "x.jsonl", "--out", tmp_path / "out", "--model_name_or_path", tiny_dir]
    said = refusal(data_prep.main, capsys, *argv)
    assert "chosen and rejected are not whole dialogues, and no known column holds the prompt" in said
    assert said.endswith("if 'user_prompt' does: --columns prompt=user_prompt")
    call(data_prep.main, *argv, "--columns", "prompt=user_prompt")
    assert packed.Packed(tmp_path / "out").meta["form"] == "--columns"
    beside = {
        "user": "who asked",
        "chosen": "\n\nHuman: Q\n\nAssistant: good",
        "rejected": "\n\nHuman: Q\n\nAssistant: bad",
    }
    assert forms.find_columns("preferences", [Row(1, beside)], {}, "x")[1] == "chosen, rejected"


def test_dates_beside_a_row_that_is_left_out(tiny_dir, tmp_path):
    """Rows of parquet hold more than JSON can say."""
    import datetime

    import pyarrow
    import pyarrow.parquet

    when = datetime.datetime(2026, 1, 2)
    table = [{"prompt": "Q", "chosen": text, "rejected": "bad", "when": when} for text in ("good", "bad")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "x.parquet")
    meta, [left_out] = prep(tmp_path / "x.parquet", tmp_path / "out", tiny_dir)
    assert meta["kept"] == 1 and left_out["reason"] == "chosen equals rejected" and "2026-01-02" in left_out["text"]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**row, "prompt": when} for row in table]), tmp_path / "y.parquet"
    )
    with pytest.raises(InputError, match="found a datetime"):
        prep(tmp_path / "y.parquet", tmp_path / "other", tiny_dir)


def test_ties_are_listed(tiny_dir, tmp_path):
    """No preference is no malformed row: it is listed, and the others are kept."""
    table = [{**AB, "preference": said} for said in ("a", "tie", None, "b", 0.5, float("nan"))]
    (tmp_path / "ab.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    meta, listed = prep(tmp_path / "ab.jsonl", tmp_path / "out", tiny_dir)
    assert meta["kept"] == 2 and [(row["line"], row["reason"]) for row in listed] == [
        (2, "no preference"),
        (3, "no preference"),
        (5, "no preference"),
        (6, "no preference"),
    ]


@pytest.mark.parametrize(
    "row, words",
    [
        ({**AB, "preference": "c"}, "expected 'preference' to name response_a or response_b, found \"c\""),
        ({**AB, "preference": 1}, "found 1"),  # the first or the second? not guessed
        ({**AB, "preference": float("inf")}, "found Infinity"),
        (
            {"prompt": "Q", "response_1": "a", "response_2": "b", "label": 0},
            "'label' is 0 in some rows, which names neither",
        ),
        (
            {"input": {"messages": []}, "preferred_output": said("a"), "non_preferred_output": said("b")},
            "in 'input', found an empty list",
        ),
        ({"chosen": {"messages": []}, "rejected": said("b")}, "in 'chosen', found an empty list"),
        (AB, "no column that says which is preferred"),
        ({"prompt": "Q", "completion": "A", "label": True}, "DPO needs pairs"),
        ({"text": "x"}, "no known form has these columns; the columns are text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "u"}]}], "chosen": "a", "rejected": "b"},
            "string 'role'",
        ),
    ],
)
def test_refusals(row, words, tiny_dir, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["--in", tmp_path / "x.jsonl", "--out", tmp_path / "out", "--model_name_or_path", tiny_dir]
    said = refusal(data_prep.main, capsys, *argv)
    assert words in said and str(tmp_path / "x.jsonl") in said and not (tmp_path / "out").exists()


def test_text_parts(chat_dir, tmp_path):
    def parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    row = {
        "prompt": [{"role": "user", "content": parts("Q", " and more")}],
        "chosen": said(parts("good")),
        "rejected": said(parts("bad")),
    }
    columns, _ = forms.find_columns("preferences", [Row(1, row)], {}, "x")
    assert rows.preference(row, columns, True) == ([{"role": "user", "content": "Q and more"}], ["good", "bad"])


@pytest.mark.parametrize("name", ["nowhere.jsonl", "no/such.parquet", "nowhere", "a/b/c"])
def test_no_such_source(name):
    with pytest.raises(InputError, match="no such file; expected rows as .jsonl, .json, .parquet or .arrow, or"):
        find([name])


def test_hub(chat_dir, tmp_path, monkeypatch):
    """A data set of the Hub by its name, offline a folder of that name; packed again only if it has changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "prefs").mkdir(parents=True)
    row = FORMS["prompt, chosen, rejected"][0]
    for split, count in (("train", 3), ("test", 2)):
        lines = [json.dumps(row | {"prompt": f"Q{number}"}) for number in range(count)]
        (tmp_path / "org" / "prefs" / f"{split}.jsonl").write_text("\n".join(lines))
    # a folder is not a name of the Hub, but `datasets` reads it like one
    monkeypatch.setattr("preferences.sources.is_file", lambda path: False)
    assert prep("org/prefs", tmp_path / "out", chat_dir)[0]["kept"] == 3
    meta, _ = prep("org/prefs", tmp_path / "test", chat_dir, "--split", "test")
    assert meta["kept"] == 2 and meta["source"] == "org/prefs"
    before = (tmp_path / "out" / "tokens.npy").stat().st_mtime_ns
    prep("org/prefs", tmp_path / "out", chat_dir, "--reuse")
    assert (tmp_path / "out" / "tokens.npy").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="with split 'nothing'"):
        read_rows(["org/prefs"], "nothing")
    with pytest.raises(InputError, match="is not a file and could not be loaded from the Hub"):
        read_rows(["org/absent"])


def test_a_disk_that_fills_while_a_data_set_downloads(chat_dir, tmp_path, monkeypatch, capsys):
    """`datasets` wraps its writer's error into one that does not mention a disk. Here files are limited to 20 kB."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("preferences.sources.is_file", lambda path: False)
    (tmp_path / "org" / "prefs").mkdir(parents=True)
    row = FORMS["prompt, chosen, rejected"][0]
    (tmp_path / "org" / "prefs" / "train.jsonl").write_text("\n".join([json.dumps(row)] * 5000))
    argv = ["--in", "org/prefs", "--out", tmp_path / "out", "--model_name_or_path", chat_dir]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        sentence = refusal(data_prep.main, capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written (" in sentence and "File too large" in sentence and "Free some disk space" in sentence
    assert not (tmp_path / "out").exists()
    call(data_prep.main, *argv)
    assert packed.Packed(tmp_path / "out").meta["rows"] == 5000


@pytest.mark.parametrize(
    "name, kept, rows_in",
    [
        ("llamafactory_dpo_en_demo_150.json", None, 150),
        ("hh_rlhf_harmless_test_500.jsonl", 499, 500),
        ("torchtune_stack_exchange_paired_tiny.json", 24, 25),
    ],
)
def test_real_files(name, kept, rows_in, shared, chat_dir, tmp_path):
    meta, listed = prep(shared / "prefs" / name, tmp_path / "out", chat_dir)
    assert meta["rows"] == rows_in and meta["kept"] > 0.9 * rows_in and kept in (None, meta["kept"])
    print(name, meta["form"], meta["kept"], meta["dropped"])


@pytest.mark.parametrize("asked", ["Q", "\n\nHuman: Q\n\nAssistant:", [{"role": "user", "content": "Q"}]])
def test_a_prompt_beside_whole_dialogues_is_not_read_twice(asked):
    """hh-rlhf's dialogues are strings. A prompt column beside them repeats their beginning, or is another text."""
    columns = {"prompt": "question", "chosen": "chosen", "rejected": "rejected"}
    sides = {name: f"\n\nHuman: Q\n\nAssistant: {name}" for name in ("chosen", "rejected")}
    prompt, responses = rows.preference({"question": asked} | sides, columns, chat=False)
    assert prompt == "\n\nHuman: Q\n\nAssistant:" and responses == [" chosen", " rejected"]
    with pytest.raises(rows.Malformed, match="--ignore_columns question"):
        rows.preference({"question": "A text to read."} | sides, columns, chat=False)


@pytest.mark.parametrize("name", ["context", "history"])
@pytest.mark.parametrize(
    "sides",
    [
        {"chosen": [*USER, *said("good")], "rejected": [*USER, *said("bad")]},
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        {"messages": [*USER, *said("good")], "rejected_response": "bad"},
    ],
)
def test_context_beside_whole_dialogues_comes_before_them(name, sides, chat_dir, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(sides | {name: "Some text. Read it."}))
    argv = ["--in", tmp_path / "rows.jsonl", "--out", tmp_path / "x", "--model_name_or_path", chat_dir]
    assert not call(data_prep.main, *argv)
    tokenizer = tokenization.load_tokenizer(str(chat_dir))
    prompt, *responses = map(tokenizer.decode, packed.Packed(tmp_path / "x")[0])
    assert prompt.index("Some text. Read it.") < prompt.index("Q") and prompt.count("Q") == 1
    assert ["good" in responses[0], "bad" in responses[1]] == [True, True]
