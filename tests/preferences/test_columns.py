"""Tests of what is read beside prompt and responses, and of what is not: in preferences, SFT and judged responses.

bash tests/run.sh tests/preferences/test_columns.py
"""

import json
import shutil

import pytest
from small import call, refusal

import config
import data_prep
from files import InputError
from models import tokenization
from preferences import packed
from preferences.encoding import make_encoder
from reasoning import judged

PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
SFT = {"prompt": "Q", "response": "good"}
JUDGED = {"prompt": "Q", "response": "good", "score": 1}
USER, SAID = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}
EARLIER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SYSTEM = {"role": "system", "content": "S"}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
# renders the reasoning of the last message, as Qwen3's template does
THINKING = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['reasoning_content'] and loop.last %}<think>"
    "{{ m['reasoning_content'] }}</think>{% endif %}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def encoders(tiny_dir, chat_dir):
    """{--template: Encoder} of a model with a chat template and one without."""
    made = {}
    for template, model in (("chat", chat_dir), ("none", tiny_dir)):
        args = config.DataArguments(template=template, max_length=400)
        tokenizer = tokenization.load_tokenizer(str(model))
        made[template] = make_encoder(args, config.ModelArguments(model_name_or_path=str(model)), tokenizer)
    return made


@pytest.fixture
def read(encoders, tmp_path):
    """read(rows, task, **DataArguments) -> ([(prompt, responses)], lines to print); a malformed row is its detail."""

    def call(table, task="preferences", template="chat", **given):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
        args = config.DataArguments(task=task, preference_data_path=[str(path)], template=template, **given)
        rows, _, lines = data_prep.read(args, encoders[template])
        return [row.detail if row.reason else row.parts for row in rows], lines

    return call


def judge(tmp_path, table, **given):
    """The Judged of rows."""
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return judged.read(str(path), **given)


# --- what comes before the prompt ---

PROMPTS = {  # name: (columns beside a prompt "Q", the prompt in a chat, and without a template)
    "system": ({"system": "S"}, [SYSTEM, USER], "S\n\nQ"),
    "system_prompt": ({"system_prompt": "S"}, [SYSTEM, USER], "S\n\nQ"),
    "system_message": ({"system_message": "S", "system": ""}, "Q", "Q"),  # the first name that a file has
    "an empty system text": ({"system_prompt": " \n"}, "Q", "Q"),
    "text": ({"context": "C"}, "C\n\nQ", "C\n\nQ"),
    "texts": ({"context": ["C", "D"]}, "C\n\nD\n\nQ", "C\n\nD\n\nQ"),
    "input": ({"input": "2 and 3"}, "2 and 3\n\nQ", "2 and 3\n\nQ"),
    "earlier turns": ({"context": EARLIER}, [*EARLIER, USER], None),
    "earlier turns up to the prompt": ({"context": [*EARLIER, USER]}, [*EARLIER, USER], None),
    "history": ({"history": [["a", "b"]]}, [*EARLIER, USER], None),
    "history as JSON": ({"history": '[["a", "b"]]'}, [*EARLIER, USER], None),
    "history of messages": ({"history": EARLIER}, [*EARLIER, USER], None),
    "no history": ({"history": []}, "Q", "Q"),
    "all": (
        {"input": "I", "context": "C", "history": [["a", "b"]], "system_prompt": "S"},
        [SYSTEM, *EARLIER, {"role": "user", "content": "C\n\nI\n\nQ"}],
        None,
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_what_comes_before_the_prompt(name, read, tmp_path):
    """In the same order and form for preferences, SFT and judged responses, beside any prompt column."""
    more, chat, plain = PROMPTS[name]
    if name == "system_message":
        more = {"system_message": ""}
    for column in ("prompt", "question", "query"):
        for task, row in (("preferences", PAIR), ("sft", SFT)):
            row = {(column if key == "prompt" else key): row[key] for key in row} | more
            [(prompt, responses)], lines = read([row], task)
            assert prompt == chat and responses[0] == "good" and lines[0].startswith("part of the prompt: ")
            [found], _ = read([row], task, template="none")
            assert found[0] == plain or plain is None and "need a chat template" in found
        row = {(column if key == "prompt" else key): JUDGED[key] for key in JUDGED} | more
        assert judge(tmp_path, [row]).groups == {json.dumps(chat): {"good": 1}}


def test_the_input_of_an_instruction_follows_it(read, tmp_path):
    row = {"instruction": "Add.", "input": "2 and 3", "system": "S"}
    want = [SYSTEM, {"role": "user", "content": "Add.\n2 and 3"}]
    assert read([row | {"chosen": "5", "rejected": "6"}])[0] == [(want, ["5", "6"])]
    assert read([row | {"output": "5"}], "sft")[0] == [(want, ["5"])]
    assert judge(tmp_path, [row | {"output": "5", "score": 9}]).groups == {json.dumps(want): {"5": 9}}


def test_columns_names_the_parts_of_a_prompt(read, tmp_path):
    row = {"persona": "S", "passage": "C", "turns": [["a", "b"]]}
    named = "system=persona,context=passage,history=turns"
    want = [SYSTEM, *EARLIER, {"role": "user", "content": "C\n\nQ"}]
    assert read([PAIR | row], columns=named)[0] == [(want, ["good", "bad"])]
    assert read([SFT | row], "sft", columns=named)[0] == [(want, ["good"])]
    given = dict(part.split("=") for part in named.split(","))
    assert judge(tmp_path, [JUDGED | row], given=given).groups == {json.dumps(want): {"good": 1}}
    with pytest.raises(InputError, match="expected prompt=NAME,response=NAME,system=NAME"):
        read([SFT], "sft", columns="sytem=persona")


def test_two_system_texts_are_refused(read):
    messages = [{"role": "system", "content": "own"}, USER]
    [found], _ = read([PAIR | {"prompt": messages, "system": "S"}])
    assert found.startswith("expected one system text, found another in the messages than in its column")
    assert read([PAIR | {"prompt": messages, "system": "own "}])[0] == [(messages, ["good", "bad"])]


def test_parts_beside_whole_dialogues(read):
    """Before their first question; what they repeat is not said twice."""
    turns = [SYSTEM, {"role": "user", "content": "C\n\na"}, EARLIER[1], USER]
    row = {"messages": [*EARLIER, USER, SAID], "context": "C", "system": "S"}
    assert read([row], "sft")[0] == [(turns, ["good"])]
    assert read([row | {"context": "Q", "system": ""}], "sft")[0] == [([*EARLIER, USER], ["good"])]
    assert read([{"messages": [USER, SAID], "history": [["a", "b"]]}], "sft")[0] == [([*EARLIER, USER], ["good"])]


# --- what is not read ---

UNREAD = {  # name: (columns beside any others, the name that stops the job, what it holds)
    "a document": ({"document": "Ann has 6 cups."}, "document", "text"),
    "facts": ({"knowledge": ["Ann has 6 cups.", "Bo has 7."]}, "knowledge", "text"),
    "an object": ({"passages": {"title": ["T"], "text": ["Ann has 6 cups."]}}, "passages", "an object"),
    "turns": ({"trajectory": [{"from": "user", "value": "Solve 2 + 3."}]}, "trajectory", "messages"),
    "a sentence named as a source": ({"source": "Das ist ein Haus."}, "source", "text"),
    "a prompt in the metadata": ({"metadata": {"system_prompt": "Be brief."}}, "metadata", "an object"),
    "the same as JSON": ({"metadata": '{"system_prompt": "Be brief."}'}, "metadata", "text"),
    "a passage in the metadata": ({"meta": {"passage": "Ann has 6 cups."}}, "meta", "an object"),
    "a second system text": ({"system": "S", "system_prompt": "T"}, "system_prompt", "text"),
    "thoughts": ({"reasoning": "It is so. It is."}, "reasoning", "text"),
    "an image": ({"image": {"bytes": "aGk=", "path": "a.jpg"}}, "image", "images, video or audio"),
    "the path of an image": ({"images": ["a.jpg"]}, "images", "images, video or audio"),
    "sound": ({"audio": {"array": [0.1, 0.2], "sampling_rate": 16000}}, "audio", "images, video or audio"),
    "a video": ({"video_path": "a.mp4"}, "video_path", "images, video or audio"),
    "tools": ({"tools": CALL}, "tools", "tools or their calls"),
    "tools as JSON": ({"tools": json.dumps(CALL)}, "tools", "tools or their calls"),
    "a prompt named as meta": ({"meta_prompt": "You are a pirate. Talk so."}, "meta_prompt", "text"),
    "what a user prefers": ({"user_preferences": "Short answers."}, "user_preferences", "text"),
    "choices that are numbers": ({"choices": ["4", "5"]}, "choices", "text"),
    "options by letter": ({"options": {"A": "4", "B": "5"}}, "options", "an object"),
    "functions": ({"available_functions": [{"name": "f"}]}, "available_functions", "tools or their calls"),
}
HARMLESS = {
    "ids": {"id": "r1", "prompt_id": "ab12", "sha256": "ff", "uuid": "x"},
    "scores": {"score_chosen": 8.5, "chosen-rating": "5.0", "margin": 3, "rewards": {"helpful": "good, very"}},
    "sources": {"source": "ultrachat 200k", "dataset": "d", "url": "https://a.b/c?d=e", "split": "train"},
    "models": {"model_a": "gpt 4", "chosen_model": "a/b", "generator": "c"},
    "times": {"timestamp": "2026-01-02 10:00:00", "when": "2026-01-02T10:00:00Z", "created": "Mon 3 May"},
    "labels": {"language": "English", "category": "closed_qa", "domain": "high school physics", "task": "Math_CoT"},
    "annotations": {"annotations": {"helpful": {"Rationale": "It is. So."}}, "preference_statement": "A is. Yes."},
    "metadata": {"meta": {"strategy": "label", "answer": "12", "note": "Two sentences. Here."}},
    "nothing": {"image": None, "images": [], "tools": "[]", "context": "", "notes": " ", "video": {"bytes": None}},
    "numbers": {"turn": 1, "is_code": False, "lengths": [1, 2], "gold": "8"},
    "the same again": {"messages": [USER, SAID], "question": "Q"},
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_stops_the_job(name, read, tmp_path):
    """With its name, what it holds and the ways out, of which --ignore_columns goes on without it."""
    more, column, what = UNREAD[name]
    prompt = "S" if "system" in more else ""
    for task, row in (("preferences", PAIR), ("sft", SFT)):
        for named in ({}, {"columns": "prompt=prompt"}):
            with pytest.raises(InputError) as error:
                read([row | more], task, **named)
            sentence = str(error.value)
            assert f"nothing reads {column} ({what}" in sentence and f"--ignore_columns {column} goes on" in sentence
            assert ("--columns" in sentence) == (what in ("text", "messages"))
        [(found, responses)], lines = read([row | more], task, ignore_columns=column)
        assert prompt in str(found) and responses[0] == "good" and lines[-1] == f"not read: {column}"
    with pytest.raises(InputError) as error:
        judge(tmp_path, [JUDGED | more])
    assert f"judged.jsonl:1: nothing reads {column} ({what}" in str(error.value)
    assert judge(tmp_path, [JUDGED | more], ignored=[column]).responses == 1


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_listed(name, read, tmp_path):
    more = HARMLESS[name]
    empty = {"image", "images", "tools", "context", "notes", "video"} if name == "nothing" else set()
    for task, row in (("preferences", PAIR), ("sft", SFT)):
        [(prompt, responses)], lines = read([row | more], task)
        assert prompt == "Q" and responses[0] == "good"
        listed = lines[-1].removeprefix("not read: ").split(", ") if lines else []
        assert set(listed) >= more.keys() - empty
    assert judge(tmp_path, [JUDGED | more]).responses == 1 or name == "scores"


def test_a_column_that_few_rows_fill_makes_them_malformed(read):
    table = [PAIR | {"prompt": f"Q{number}"} for number in range(5)]
    table[3]["notes"] = "Ann has 6 cups."
    found, _ = read(table)
    assert "nothing reads notes (text), which would be lost" in found[3] and found[4] == ("Q4", ["good", "bad"])


@pytest.mark.parametrize(
    "field, what",
    [
        ({"tool_calls": CALL}, "tools or their calls"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "tools or their calls"),
        ({"images": ["a.jpg"]}, "images, video or audio"),
        ({"comment": "Be nice to all."}, "a field of messages"),
        ({"content": [{"type": "text", "text": "good", "image": "a.jpg"}]}, "images, video or audio"),
    ],
)
def test_fields_of_messages(field, what, read, tmp_path):
    """In the prompt and in the response, of preferences, SFT and judged responses."""
    name = "image" if "content" in field else next(iter(field))
    last, turns = SAID | field, [USER, SAID | field, USER]
    cases = [
        ("preferences", {"prompt": [USER], "chosen": [last], "rejected": "bad"}),
        ("preferences", {"prompt": turns, "chosen": "good", "rejected": "bad"}),
        ("preferences", {"chosen": [USER, last], "rejected": [USER, SAID | {"content": "bad"}]}),
        ("sft", {"messages": [USER, last]}),
        ("sft", {"prompt": turns, "response": "good"}),
    ]
    for task, row in cases:
        with pytest.raises(
            InputError, match=f"nothing reads {name} .{what}.*; --ignore_columns {name} goes on without"
        ):
            read([row], task)
        [(_, responses)], _ = read([row], task, ignore_columns=name)
        assert responses[0] == "good"
    row = {"prompt": [USER], "completion": [last], "label": True}
    with pytest.raises(InputError, match=f"nothing reads {name} "):
        judge(tmp_path, [row])
    assert judge(tmp_path, [row], ignored=[name]).groups == {json.dumps([USER]): {"good": 1}}


def test_fields_without_words_are_read_over(read):
    """The nulls of OpenAI's messages, ids and weights."""
    fields = {
        "tool_calls": None,
        "refusal": None,
        "audio": None,
        "annotations": [],
        "weight": 1,
        "name": "ann",
        "id": "x",
    }
    [(prompt, responses)], lines = read([{"messages": [USER, SAID | fields]}], "sft")
    assert (prompt, responses) == ([USER], ["good"]) and set(lines[0][10:].split(", ")) == {"weight", "name", "id"}


def test_the_tools_of_an_input(read):
    row = {"input": {"messages": [USER], "tools": CALL}, "preferred_output": [SAID], "non_preferred_output": [SAID]}
    with pytest.raises(InputError, match="nothing reads tools"):
        read([row])


def test_bytes_are_no_text(read, tiny_dir, tmp_path, capsys):
    """Pictures in parquet, whatever their column is called."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR | {"raw": b"\xff\0"}]), tmp_path / "x.parquet")
    argv = ["--in", tmp_path / "x.parquet", "--out", tmp_path / "out", "--model_name_or_path", tiny_dir]
    assert "nothing reads raw (images, video or audio)" in refusal(data_prep.main, capsys, *argv)


# --- reasoning ---


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_reasoning(name, read, tmp_path):
    last = SAID | {name: "It is.\n"}
    cases = [
        ("preferences", {"prompt": [USER], "chosen": [last], "rejected": "bad"}, ["bad"]),
        ("sft", {"messages": [USER, last]}, []),
    ]
    inline = "<think>\nIt is.\n</think>\n\ngood"
    for task, row, others in cases:
        with pytest.raises(
            InputError, match=f"nothing reads {name} .reasoning.*--reasoning inline .* --reasoning drop"
        ):
            read([row], task)
        assert read([row], task, reasoning="drop")[0] == [([USER], ["good", *others])]
        assert read([row], task, reasoning="inline")[0] == [([USER], [inline, *others])]
    row = {"prompt": [USER], "completion": [last], "label": True}
    with pytest.raises(InputError, match=f"nothing reads {name} .reasoning"):
        judge(tmp_path, [row])
    for way, text in (("drop", "good"), ("inline", inline)):
        assert list(judge(tmp_path, [row], reasoning=way).groups.values()) == [{text: 1}]


def test_a_template_that_renders_reasoning_is_given_it(chat_dir, tmp_path):
    model = shutil.copytree(chat_dir, tmp_path / "thinking")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": THINKING}))
    source, out = tmp_path / "x.jsonl", tmp_path / "out"
    argv = ["--task", "sft", "--in", source, "--out", out, "--model_name_or_path", model]
    for name in ("reasoning_content", "thinking"):  # transformers gives a template the one as the other
        thought = SAID | {name: "It is."}
        source.write_text(json.dumps({"messages": [USER, thought, USER, thought]}))
        call(data_prep.main, *argv)
        tokenizer = tokenization.load_tokenizer(str(model))
        prompt, response, _ = (tokenizer.decode(ids.tolist()) for ids in packed.Packed(out)[0])
        assert response.startswith("<think>It is.</think>good") and "think" not in prompt  # of the last answer alone


# --- what is remembered ---


def test_what_is_ignored_is_remembered(tiny_dir, tmp_path, capsys):
    """meta.json has it, so that --reuse packs again where it changes, and not where it does not."""
    source, out = tmp_path / "x.jsonl", tmp_path / "out"
    source.write_text(json.dumps(PAIR | {"context": "C", "id": "x"}))
    argv = ["--in", source, "--out", out, "--model_name_or_path", tiny_dir, "--reuse"]
    for more, ignored, is_new in (([], [], True), (["--ignore_columns", "context"], ["context"], True)):
        for again in (is_new, False):
            capsys.readouterr()
            call(data_prep.main, *argv, *more)
            assert ("up to date" in capsys.readouterr().out) != again
        assert packed.Packed(out).meta["ignore_columns"] == ignored
    assert "no column 'contxt'; the columns are prompt, chosen, rejected, context, id" in refusal(
        data_prep.main, capsys, *argv, "--ignore_columns", "contxt"
    )


# --- judged responses ---


@pytest.mark.parametrize(
    "rows, groups, left_out",
    [
        (  # dialogues without a prompt column; LLaMA-Factory's KTO
            [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}], "kto_tag": True}],
            {json.dumps([USER]): {"good": 1}},
            0,
        ),
        ([{"prompt": [USER], "completion": [USER, SAID], "label": 0}], {json.dumps([USER]): {"good": 0}}, 0),
        ([JUDGED | {"response": None}, JUDGED], {'"Q"': {"good": 1}}, 1),
        ([{"instruction": "Q", "generations": ["good", None, ""], "ratings": [5, None, 3]}], {'"Q"': {"good": 5}}, 2),
        ([{"prompt": "Q", "responses": [[SAID], [SAID | {"content": "bad"}]], "scores": [2, 1]}],
         {'"Q"': {"good": 2, "bad": 1}}, 0),
        (  # UltraFeedback
            [{"instruction": "Q", "correct_answers": ["None."], "models": ["a"], "completions": [
                {"model": "a", "principle": "honesty", "custom_system_prompt": "Be honest. Do.", "response": "good",
                 "annotations": {"honesty": {"Rationale": "It is. So."}}, "critique": "Fine. Good.",
                 "fine-grained_score": 4.0, "overall_score": 7.0}]}],
            {'"Q"': {"good": 7}},
            0,
        ),
        (  # evaluate.py
            [{"prompt": "Q", "response": "good", "answer": "8 and more. Yes.", "extracted": "8", "correct": True}],
            {'"Q"': {"good": 1}},
            0,
        ),
    ],
)  # fmt: skip
def test_judged_rows(rows, groups, left_out, tmp_path):
    found = judge(tmp_path, rows)
    assert (found.groups, found.left_out) == (groups, left_out)


def test_the_columns_of_judged_rows_can_be_named(tmp_path):
    row = {"q": "Q", "text": "good", "judge": 3, "notes": "Hm. Well."}
    given = {"prompt": "q", "response": "text", "score": "judge"}
    assert judge(tmp_path, [row], given=given, ignored=["notes"]).groups == {'"Q"': {"good": 3}}
    with pytest.raises(InputError, match="expected one message in 'messages' that answers the prompt, found others"):
        judge(tmp_path, [{"prompt": "other", "messages": [USER, SAID], "score": 1}])
    with pytest.raises(InputError, match="judged.jsonl:2: the score is in 'rating', and in 'score' before"):
        judge(tmp_path, [JUDGED, {"prompt": "Q", "response": "bad", "rating": 4}])


# --- the inputs of reports ---


@pytest.mark.parametrize(
    "name, task, sentence",
    [
        ("trajectory", "preferences", "--columns prompt=trajectory"),
        ("tool_calls-in-messages", "preferences", "nothing reads tool_calls (tools or their calls)"),
        ("image-column", "preferences", "nothing reads image (images, video or audio)"),
    ],
)
def test_reported_files_that_are_refused(name, task, sentence, shared, encoders):
    args = config.DataArguments(task=task, preference_data_path=[str(shared.parent / "reports" / f"{name}.jsonl")])
    with pytest.raises(InputError) as error:
        data_prep.read(args, encoders["chat"])
    assert sentence in str(error.value)
