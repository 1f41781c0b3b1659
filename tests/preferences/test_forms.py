"""Tests of forms of public data sets and tools, and of files that are not what their names say, row by row.

bash tests/run.sh tests/preferences/test_forms.py
"""

import json
import re

import pytest
from prepared import write_rows
from small import ROOT, call, refusal

import data_prep
from files import InputError
from models import tokenization
from preferences import forms, packed, rows, several
from preferences.sources import LeftOut, read_rows

REPORTS = ROOT.parent / "shared" / "reports"
ASKED, FIVE, SIX = (
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "5"), ("assistant", "6"))
)
FIRST = [rows.user("Hi"), rows.assistant("Hello"), ASKED]
PAIR = ([ASKED], ["5", "6"])  # what a row of messages says
TEXT = ("Q", ["5", "6"])
TIE, MALFORMED = [("no preference",)], [("malformed",)]


def read(paths, task="preferences"):
    """(form, what each pair of the files says, or why it is left out)."""
    table = read_rows(list(map(str, paths)))
    columns, form = forms.find_columns(task, table, {}, str(paths[0]))
    if task == "preferences":
        table, columns = several.one_pair_each(table, columns)
    outcomes, reader = [], rows.preference if task == "preferences" else rows.demonstration
    for row in table:
        try:
            outcomes.append((row.reason, row.detail) if row.reason else reader(row.value, columns, True))
        except LeftOut as left_out:
            outcomes.append(left_out.args)
    return form, outcomes


def dumped(row):
    """The row with its lists and objects written as JSON."""
    return {name: json.dumps(value) if isinstance(value, (list, dict)) else value for name, value in row.items()}


def parts(said, **more):
    return said | {"content": [{"type": "text", "value": said["content"]}], "loss_weight": 1.0} | more


DIALOGUES = {"chosen": [ASKED, FIVE], "rejected": [ASKED, SIX]}
ARENA = {"prompt": '["Q"]', "response_a": '["5"]', "response_b": '["6"]', "winner_tie": 0}
TURNS = {"prompt": ["Hi", "Q"], "response_a": ["Hello", "6"], "response_b": ["Hello", "5"]}
RANKED = [{"answer": "6", "rank": 2.0}, {"answer": "7", "rank": 3}, {"answer": "5", "rank": 1}]
READ = {  # what it is: (row, form, pairs)
    "JSON in every column": (
        dumped({"prompt": [ASKED], "chosen": [FIVE], "rejected": [SIX]}),
        "prompt, chosen, rejected",
        [PAIR],
    ),
    "JSON of whole dialogues": (dumped(DIALOGUES), "chosen, rejected", [PAIR]),
    "JSON of an object": (dumped({"input": {"messages": [ASKED]}, "chosen": FIVE, "rejected": SIX}), None, [PAIR]),
    "as Python writes it": ({name: str(value) for name, value in DIALOGUES.items()}, "chosen, rejected", [PAIR]),
    "JSON of from and value": (
        {"conversations": '[{"from": "human", "value": "Q"}]', "chosen": "5", "rejected": "6"},
        None,
        [PAIR],
    ),
    "ms-swift": (
        {"query": "Q", "response": "5", "rejected_response": "6"},
        "query, response, rejected_response",
        [TEXT],
    ),
    "ms-swift's messages": (
        {"messages": [*FIRST, FIVE], "rejected_response": "6"},
        "messages, rejected_response",
        [(FIRST, ["5", "6"])],
    ),
    "ms-swift's rejected_messages": (
        {"messages": [ASKED, FIVE], "rejected_messages": [ASKED, SIX]},
        "messages, rejected_messages",
        [PAIR],
    ),
    "ms-swift's turns": (
        {
            "conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "Q", "assistant": "5"}],
            "rejected_response": "6",
        },
        "conversation, rejected_response",
        [(FIRST, ["5", "6"])],
    ),
    "axolotl": (
        {"messages": FIRST, "chosen": FIVE, "rejected": SIX},
        "messages, chosen, rejected",
        [(FIRST, ["5", "6"])],
    ),
    "axolotl's argilla": (
        {"instruction": "Q", "chosen_response": "5", "rejected_response": "6"},
        "instruction, chosen_response, rejected_response",
        [TEXT],
    ),
    "Oumi": ({"prompt": "Q", "chosen": {"messages": [FIVE]}, "rejected": {"messages": [SIX]}}, None, [TEXT]),
    "messages that repeat the chosen dialogue": ({"messages": [ASKED, FIVE], **DIALOGUES}, None, [PAIR]),
    "a prompt without the system message": (
        {"prompt": [ASKED], "chosen": [{"role": "system", "content": "S"}, ASKED, FIVE], "rejected": SIX},
        None,
        [([{"role": "system", "content": "S"}, ASKED], ["5", "6"])],
    ),
    "LLaMA-Factory v1": (
        {"chosen_messages": [parts(ASKED), parts(FIVE)], "rejected_messages": [parts(ASKED), parts(SIX)]},
        "chosen_messages, rejected_messages",
        [PAIR],
    ),
    "XTuner": (
        {"chosen_conversations": DIALOGUES["chosen"], "rejected_conversations": DIALOGUES["rejected"]},
        None,
        [PAIR],
    ),
    "55k: the first wins": (
        {**ARENA, "winner_model_a": 1, "winner_model_b": 0},
        "A/B (response_a, response_b, preferred by winner_model_a, winner_model_b)",
        [TEXT],
    ),
    "55k: the second wins": ({**ARENA, "winner_model_a": "0", "winner_model_b": True}, None, [("Q", ["6", "5"])]),
    "55k: a tie": ({**ARENA, "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}, None, TIE),
    "55k: no answer": (
        {**ARENA, "response_a": "[null]", "winner_model_a": 0, "winner_model_b": 1},
        None,
        [("empty response",)],
    ),
    "55k: several turns": ({**TURNS, "winner_model_a": 0, "winner_model_b": 1}, None, [(FIRST, ["5", "6"])]),
    "two models that answered each question": (
        {**TURNS, "response_a": ["Hey", "6"], "winner": "model_b"},
        None,
        [("dialogues differ",)],
    ),
    "more questions than answers": ({**TURNS, "prompt": ["Hi", "Q", "R"], "winner": "model_b"}, None, MALFORMED),
    "turns and a winner": ({**TURNS, "winner": "model_b"}, None, [(FIRST, ["5", "6"])]),
    "both are bad": ({"prompt": "Q", "response_a": "5", "response_b": "6", "winner": "Both bad"}, None, TIE),
    "HelpSteer2": (
        {"prompt": "Q", "response_1": "6", "response_2": "5", "preference_strength": 1, "preference_statement": "..."},
        "A/B (response_1, response_2, preferred by preference_strength)",
        [TEXT],
    ),
    "HelpSteer2: the same": (
        {"prompt": "Q", "response_1": "6", "response_2": "5", "preference_strength": 0},
        None,
        TIE,
    ),
    "HelpSteer3": ({"context": [ASKED], "response1": "5", "response2": "6", "overall_preference": "-1"}, None, [PAIR]),
    "HelpSteer3: no number": (
        {"context": [ASKED], "response1": "5", "response2": "6", "overall_preference": "good"},
        None,
        MALFORMED,
    ),
    "Nectar": ({"prompt": "Q", "answers": RANKED}, "ranked (answers)", [TEXT, ("Q", ["5", "7"])]),
    "ranks that are equal": (
        {"prompt": "Q", "responses": [{"text": "5", "rank": 1}, {"text": "6", "rank": 1}]},
        None,
        TIE,
    ),
    "a rank that is none": ({"prompt": "Q", "answers": [*RANKED, {"answer": "8"}]}, None, MALFORMED),
    "several rejected": ({"prompt": "Q", "chosen": ["5"], "rejected": ["6", "7"]}, None, [TEXT, ("Q", ["5", "7"])]),
    "several rejected, as JSON": (
        {"prompt": "Q", "chosen": "5", "rejected": '["6", "7"]'},
        None,
        [TEXT, ("Q", ["5", "7"])],
    ),
    "several rejected dialogues": (
        {"chosen": [ASKED, FIVE], "rejected": [[ASKED, SIX], [ASKED, FIVE]]},
        None,
        [PAIR, ([ASKED], ["5", "5"])],
    ),
    "several rejected messages": (
        {"prompt": [ASKED], "chosen": FIVE, "rejected": [SIX, {"role": "assistant", "content": "7"}]},
        None,
        [PAIR, ([ASKED], ["5", "7"])],
    ),
    "several chosen": ({"prompt": "Q", "chosen": ["5", "five"], "rejected": "6"}, None, MALFORMED),
    "roles in capitals": (
        {
            "prompt": [ASKED | {"role": "USER"}],
            "chosen": FIVE | {"role": "ASSISTANT"},
            "rejected": SIX | {"role": "Gpt"},
        },
        None,
        [PAIR],
    ),
    "Open Assistant's roles": (
        {
            "chosen": [ASKED | {"role": "prompter"}, FIVE],
            "rejected": [ASKED | {"role": "Human"}, SIX | {"role": "Model"}],
        },
        None,
        [PAIR],
    ),
    "a part of another kind": (
        {
            "chosen_messages": [ASKED, parts(FIVE)],
            "rejected_messages": [ASKED, SIX | {"content": [{"type": "image_url", "value": "u"}]}],
        },
        None,
        MALFORMED,
    ),
    "an answer that is JSON of other things": (
        {"prompt": "Q", "chosen": '{"from": "USD", "value": "5"}', "rejected": '[{"name": "A", "role": "user"}]'},
        None,
        [("Q", ['{"from": "USD", "value": "5"}', '[{"name": "A", "role": "user"}]'])],
    ),
    "JSON of a tool's turn": (
        {"prompt": json.dumps([ASKED, {"role": "tool", "content": "x"}]), "chosen": "5", "rejected": "6"},
        None,
        MALFORMED,
    ),
    "as numpy prints it": (
        {
            "prompt": "[{'role': 'user', 'content': 'Hi'}\n {'role': 'user', 'content': 'Q'}]",
            "chosen": "5",
            "rejected": "6",
        },
        None,
        MALFORMED,
    ),
    "an answer that is JSON": (
        {"prompt": "Q", "chosen": '{"role": 5}', "rejected": '["5", "6"]'},
        None,
        [("Q", ['{"role": 5}', '["5", "6"]'])],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_rows(name, tmp_path):
    row, form, pairs = READ[name]
    found, outcomes = read([write_rows(tmp_path / "x.jsonl", [row])])
    assert form in (None, found)
    for outcome, want in zip(outcomes, pairs, strict=True):
        assert outcome[: len(want)] == want


SFT = {
    "JSON of messages": (dumped({"messages": [*FIRST, FIVE]}), (FIRST, ["5"])),
    "parts": ({"messages": [parts(ASKED), parts(FIVE)]}, ([ASKED], ["5"])),
    "turns": ({"conversation": [{"human": "Q", "assistant": "5"}]}, ([ASKED], ["5"])),
    "roles in capitals": (
        {"conversations": [{"from": "Human", "value": "Q"}, {"from": "GPT", "value": "5"}]},
        ([ASKED], ["5"]),
    ),
    "query and response": ({"query": "Q", "response": "5"}, ("Q", ["5"])),
}


@pytest.mark.parametrize("name", SFT)
def test_sft_rows(name, tmp_path):
    row, want = SFT[name]
    assert read([write_rows(tmp_path / "x.jsonl", [row])], "sft")[1] == [want]


@pytest.mark.parametrize(
    "table, said",
    [
        ([{"response_1": "5", "response_2": "6", "preference": word} for word in (1, 2, -1)], "is -1 in some rows"),
        ([{"response_0": "5", "response_1": "6", "winner": word} for word in (1, 2, 2)], "is 2 in some rows"),
        ([{"answer_1": "5", "answer_2": "6", "preferred": word} for word in (1.0, "3", None)], "is 3 in some rows"),
        ([{"output_1": "5", "output_2": "6", "label": word} for word in (2, 1.5)], "is 1.5 in some rows"),
        ([{"response": "5", "rejected_answer": "6"}], "no known form has these columns"),
        ([{"thing": "T", "answer_a": "5", "answer_b": "6", "winner": "a"}], "--columns prompt=NAME says which"),
        ([{"answer": "5", "worse_answer": "6"}], "no known form has these columns"),
        ([{"completions": [{"response": "5", "score": 9}]}], "make_prefs.py --strategy label pairs them"),
        ([{"turns": "Two", "chosen": "an a", "rejected": "an e"}], "if 'turns' does: --columns prompt=turns"),
    ],
)
def test_files_that_are_refused(table, said, tmp_path):
    """Numbers that name no response; --task sft is not proposed where a column says rejected; no common beginning."""
    with pytest.raises(InputError, match=re.escape(said)):
        read(
            [
                write_rows(
                    tmp_path / "x.jsonl",
                    [row if {"turns", "thing"} & row.keys() else {"prompt": "Q", **row} for row in table],
                )
            ]
        )


def test_half_of_a_columns_texts_decide_whether_they_are_messages(tmp_path):
    good, torn = dumped({"prompt": [ASKED], "chosen": [FIVE], "rejected": "6"}), '[{"role": "user", "content": "Q'
    _, outcomes = read([write_rows(tmp_path / "x.jsonl", [good, good | {"prompt": torn}, good | {"prompt": "Q"}])])
    assert [outcome[0] for outcome in outcomes] == [[ASKED], "malformed", "malformed"]
    assert outcomes[1][1].endswith("found a text that is no JSON of messages, as others are")
    plain = {"prompt": "Q", "chosen": "5", "rejected": "6"}
    _, outcomes = read([write_rows(tmp_path / "x.jsonl", [plain, plain, plain | {"chosen": json.dumps([FIVE])}])])
    assert outcomes[:2] == [TEXT, TEXT] and "found messages written as JSON, where others are texts" in outcomes[2][1]


# --- files ---


def test_what_a_file_holds_counts_and_not_its_name(tmp_path):
    row = {"prompt": "Q", "chosen": "5", "rejected": "6"}
    for name, text, count in [
        ("lines.json", f"{json.dumps(row)}\n\n{json.dumps(row)}\n", 2),
        ("one.json", json.dumps(row), 1),
        ("dialogues.json", json.dumps(DIALOGUES), 1),
        ("list.jsonl", json.dumps([row, row]), 2),
        ("indented.jsonl", json.dumps([row, row, row], indent=2), 3),
        ("table.jsonl", json.dumps({"version": 1, "data": [row, row]}, indent=2), 2),
        ("bom.json", f"\ufeff{json.dumps(row)}\n{json.dumps(row)}", 2),
    ]:
        (tmp_path / name).write_text(text)
        assert read([tmp_path / name])[1] == [PAIR if name == "dialogues.json" else TEXT] * count, name
    (tmp_path / "lines.json").write_text(f"{json.dumps(row)}\n{{\n")
    table = read_rows([str(tmp_path / "lines.json")])
    assert table[1].reason == "malformed" and table[1].place == f"{tmp_path}/lines.json:2"


def test_json_features(tmp_path):
    """As load_dataset reads them, in lists and structs too; .arrow files of both of Arrow's formats."""
    import datasets
    import pyarrow

    said = {"role": datasets.Value("string"), "content": datasets.Value("string"), "more": datasets.Json()}
    features = {"prompt": datasets.List(said), "chosen": datasets.List(datasets.Json()), "rejected": datasets.Json()}
    row = {"prompt": [ASKED | {"more": {"n": [1]}}], "chosen": [FIVE], "rejected": [SIX]}
    made = datasets.Dataset.from_list([row, row], features=datasets.Features(features))
    made.to_parquet(str(tmp_path / "a.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    with pyarrow.ipc.new_file(str(tmp_path / "b.arrow"), made.data.table.schema) as writer:
        writer.write_table(made.data.table)
    for path in (tmp_path / "a.parquet", *(tmp_path / "saved").glob("*.arrow"), tmp_path / "b.arrow"):
        assert [row.value for row in read_rows([str(path)])] == list(made) == [row, row]
        assert read([path])[1] == [PAIR, PAIR]
    (tmp_path / "torn.arrow").write_bytes(b"ARROW1\0\0torn")
    with pytest.raises(InputError, match="torn.arrow: not an? arrow file that can be read"):
        read_rows([str(tmp_path / "torn.arrow")])


def test_several_files_are_one_data_set(tiny_dir, tmp_path, capsys):
    """Each row's file is kept in messages, rejects.jsonl and meta.json."""

    def row(number, **more):
        return {"prompt": f"Q{number}", "chosen": "5", "rejected": "6"} | more

    a = write_rows(tmp_path / "data-0.jsonl", [row(0), row(1)])
    b = write_rows(tmp_path / "data-1.jsonl", [row(1), row(2), row(3, chosen=" "), row(4)])
    (tmp_path / "data-2.json").write_text(json.dumps([row(0), row(5)]))
    out = ["--out", tmp_path / "out", "--model_name_or_path", tiny_dir]
    call(data_prep.main, "--in", a, b, tmp_path / "data-2.json", *out)
    said = capsys.readouterr().out
    assert f"3 files ({a}, {b}, " in said and ": 8 rows, 5 kept, 3 dropped" in said
    assert f"  {b}: 4 rows, 2 kept\n" in said and f"example, {a}:1:" in said
    got = packed.Packed(tmp_path / "out")
    assert got.files == {str(a): 2, str(b): 2, str(tmp_path / "data-2.json"): 1}
    places = [(got.file_of(index), int(line)) for index, line in enumerate(got.lines())]
    assert places == [(str(a), 1), (str(a), 2), (str(b), 2), (str(b), 4), (str(tmp_path / "data-2.json"), 2)]
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(each["file"], each["line"], each["detail"]) for each in listed] == [
        (str(b), 1, f"of {a}:2"),
        (str(b), 3, "chosen"),
        (str(tmp_path / "data-2.json"), 1, f"of {a}:1"),
    ]
    assert got.remake.endswith(f"--in {a} {b} {tmp_path / 'data-2.json'} --out {tmp_path / 'out'}")

    # a pattern names the same files, and a file that changes is noticed
    again = ["--reuse", "--in", tmp_path / "data-?.json*", *out]
    call(data_prep.main, *again)
    assert "5 pairs, up to date" in capsys.readouterr().out
    write_rows(b, [row(7), row(8)])
    call(data_prep.main, *again)
    assert ": 6 rows, 5 kept" in capsys.readouterr().out
    sft = ["--task", "sft", "--columns", "response=chosen", "--in", a, b, "--out", tmp_path / "sft"]
    call(data_prep.main, *sft, "--model_name_or_path", tiny_dir)
    assert packed.Packed(tmp_path / "sft").files == {str(a): 2, str(b): 2}

    write_rows(b, [row(7), row(8, chosen=1)])
    assert f"error: {b}:2: expected 'chosen'" in refusal(data_prep.main, capsys, "--in", a, b, *out)
    write_rows(a, [row(7), 7])
    with pytest.raises(InputError) as caught:
        call(data_prep.main, "--in", a, b, *out)
    first, *named = str(caught.value).splitlines()
    assert "2 files (" in first and "2 rows are malformed" in first
    assert named[0].startswith(f"  {a}:2: expected a JSON object") and named[1].startswith(f"  {b}:2: expected 'ch")
    for word, sentence in ((tmp_path / "x-*.jsonl", "no file matches this pattern"), (a, "named twice by --in")):
        assert sentence in refusal(data_prep.main, capsys, "--in", a, word, *out)


# --- the page, and public shapes ---


def test_the_rows_of_the_page_are_packed(chat_dir, tmp_path):
    """docs/data.md has a row of each form, in the order of its table: 5 over 6."""
    page = (ROOT / "docs" / "data.md").read_text().partition("## SFT")[0]
    examples = re.search(r"```json\n(.*?)```", page, re.S)[1].splitlines()
    names = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(examples) == len(names) == 17
    tokenizer = tokenization.load_tokenizer(str(chat_dir))
    for number, row in enumerate(examples):
        source = write_rows(tmp_path / f"{number}.jsonl", [row])
        call(data_prep.main, "--in", source, "--out", tmp_path / "out", "--model_name_or_path", chat_dir)
        texts = [tokenizer.decode(ids) for ids in packed.Packed(tmp_path / "out")[0]]
        assert texts == ["[user] 2 + 3?\n[assistant] ", "5</s>", "6</s>"], row


@pytest.mark.skipif(not REPORTS.is_dir(), reason="needs ../shared/reports")
def test_public_shapes():
    """{file: (pairs kept, rows without a preference)}; the others are refused."""
    kept = {"conversation-as-json-string.jsonl": (1, 0), "json-feature.parquet": (2, 0), "helpsteer3.jsonl": (1, 0)}
    kept |= {"arena-both_bad.jsonl": (1, 2), "query-response-rejected_response.jsonl": (1, 0)}
    kept |= {"several-rejected.jsonl": (3, 0), "capital-roles.jsonl": (1, 0), "llamafactory-v1-parts.jsonl": (1, 0)}
    for name, counts in kept.items():
        outcomes = read([REPORTS / name])[1]
        ties = sum(outcome[0] == "no preference" for outcome in outcomes)
        assert (sum(isinstance(outcome[1], list) for outcome in outcomes), ties) == counts, name
    for name, words in (("signed-preference", "'preference' is -2 in some"), ("trajectory", "prompt=trajectory")):
        with pytest.raises(InputError, match=words):
            read([REPORTS / f"{name}.jsonl"])
