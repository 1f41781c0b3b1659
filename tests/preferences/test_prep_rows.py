"""Tests of data_prep.py: forms of a row with and without a chat template, every reason to leave a row out.

bash tests/run.sh tests/preferences/test_prep_rows.py
"""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from new_tiny import THINK_TEMPLATE
from prepared import GOOD, HH, TEMPLATE, refuses, texts, with_template
from small import EOS

import data_prep
from files import InputError
from models import tokenization

# --- forms of a row ---


def test_columns(prep, tiny_dir):
    row = {"asked": GOOD["prompt"], "better": GOOD["chosen"], "worse": GOOD["rejected"], "other": 1}
    names = "prompt=asked,chosen=better,rejected=worse"
    got, _ = prep([row], "--columns", names, name="prefs.json")
    assert texts(tiny_dir, got) == [GOOD["prompt"], GOOD["chosen"] + "</s>", GOOD["rejected"] + "</s>"]
    assert got.meta["columns"] == {"prompt": "asked", "chosen": "better", "rejected": "worse"}
    refuses(prep, "no known form has these columns; the columns are asked, better, worse, other; name yours", [row])
    refuses(prep, "no column 'answer'; the columns are asked", [row], "--columns", names.replace("better", "answer"))
    refuses(prep, "found 'answer=b'", [row], "--columns", "prompt=a,answer=b")


def test_implicit_prompt_of_dialogue_strings(prep, tiny_dir, llada_chat_dir):
    row = {"chosen": HH + " Three.", "rejected": HH + " Threads?"}
    got, _ = prep([row])
    assert texts(tiny_dir, got) == [HH, " Three.</s>", " Threads?</s>"]
    got, _ = prep([row], model=llada_chat_dir)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    said = "Two  pens?<|eot_id|>", "Yes.<|eot_id|>", "And more?<|eot_id|>", ""
    prompt = "<s>" + "".join(header.format(*turn) for turn in zip(("user", "assistant") * 2, said))
    assert texts(llada_chat_dir, got) == [prompt, "Three.<|eot_id|>", "Threads?<|eot_id|>"]
    explicit, _ = prep([{"prompt": HH, "chosen": " Three.", "rejected": " Threads?"}], model=llada_chat_dir)
    assert explicit.tokens.tolist() == got.tokens.tolist()
    longer = row | {"chosen": HH + " A\n\nHuman: b\n\nAssistant: c"}
    refuses(prep, ":1: expected dialogues that share all but the last", [longer])


def test_how_two_texts_begin_alike_is_no_prompt(prep):
    for row in ({"chosen": "Sky? It is blue", "rejected": "Sky? It is black"}, GOOD | {"prompt": 0, "rejected": " 7"}):
        row.pop("prompt", None)
        refuses(prep, "are not whole dialogues, and no known column holds the prompt; write it into", [row])
    dialogues = [{"chosen": HH + " a", "rejected": HH + text} for text in (" b", " c")]
    refuses(prep, ":3: expected a prompt column, or dialogues", [*dialogues, row])


def test_conversational_forms_agree(prep, llada_chat_dir):
    answer = [{"role": "assistant", "content": text} for text in (" 12 ", "11")]
    prompt = [{"role": "system", "content": "Count."}, {"role": "user", "content": " How many? "}]
    share = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": share[said["role"]], "value": said["content"]} for said in (*prompt, *answer)]
    rows = [
        {"prompt": prompt, "chosen": [answer[0]], "rejected": [answer[1]]},
        {"prompt": prompt, "chosen": " 12 ", "rejected": "11"},
        {"chosen": [*prompt, answer[0]], "rejected": [*prompt, answer[1]]},
        {"prompt": " How many? ", "chosen": [*prompt, answer[0]], "rejected": [*prompt, answer[1]]},
        {"conversations": sharegpt[:2], "chosen": sharegpt[2], "rejected": sharegpt[3]},
    ]
    for row in rows:
        got, _ = prep([row], model=llada_chat_dir)
        assert texts(llada_chat_dir, got) == [
            "<s><|start_header_id|>system<|end_header_id|>\n\nCount.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "How many?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "12<|eot_id|>",
            "11<|eot_id|>",
        ]
        tokenizer = tokenization.load_tokenizer(str(llada_chat_dir))
        assert got[0][0].tolist().count(tokenizer.bos_token_id) == 1
        assert got.meta["end_token_id"] == got[0][1][-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
        assert (got.meta["template"], got.meta["pad_token_id"]) == ("chat", EOS)


def test_chat_strings_and_a_template_that_does_not_strip(prep, tiny_dir, llada_chat_dir):
    got, _ = prep([GOOD | {"chosen": " 12 "}], model=llada_chat_dir)
    assert (
        texts(llada_chat_dir, got)[0].count("<|start_header_id|>") == 2
        and texts(llada_chat_dir, got)[1] == "12<|eot_id|>"
    )
    verbatim = with_template(tiny_dir, "verbatim", TEMPLATE.replace(" | trim", ""))
    got, _ = prep([GOOD | {"chosen": " 12 "}], model=verbatim)
    assert texts(verbatim, got)[1] == " 12 <|eot_id|>"
    got, _ = prep([GOOD | {"chosen": " 12 "}], "--template", "none", model=llada_chat_dir)
    assert texts(llada_chat_dir, got)[:2] == [GOOD["prompt"], " 12 </s>"] and got.meta["template"] == "none"


def test_what_a_template_puts_before_the_last_answer_is_part_of_it(prep, tiny_dir, capsys):
    """Qwen3's empty <think> block: in both responses, in no earlier turn, and not twice where the row has it."""
    model = with_template(tiny_dir, "thinking", THINK_TEMPLATE, ["<|im_start|>", "<|im_end|>"])
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    opening, end = "<think>\n\n</think>\n\n", "<|im_end|>"
    got, _ = prep([{"prompt": talk, "chosen": "12", "rejected": opening + "11"}], model=model)
    prompt, chosen, rejected = texts(model, got)
    assert prompt.count("<|im_start|>assistant\n") == 2 and "think" not in prompt
    assert (chosen, rejected) == (f"{opening}12{end}", f"{opening}11{end}")
    assert r"begins every response with '<think>\n\n</think>\n\n'" in capsys.readouterr().out
    got, rejects = prep([GOOD | {"chosen": " 12", "rejected": f"{opening} 12"}, GOOD], model=model)
    assert [reject["reason"] for reject in rejects] == ["chosen equals rejected"]  # as the template renders them
    capsys.readouterr()
    prep([GOOD], "--template", "none", model=model)
    assert "begins every response" not in capsys.readouterr().out


def test_conversational_rows_need_a_template(prep, llada_chat_dir):
    row = GOOD | {"prompt": [{"role": "user", "content": "x"}]}
    refuses(prep, "prefs.jsonl:1: conversational rows need a chat template, and this tokenizer has none", [row])
    refuses(prep, "--template none was given", [row], "--template", "none", model=llada_chat_dir)
    refuses(prep, "--template chat: this tokenizer has no chat template", [GOOD], "--template", "chat")


def test_a_row_that_the_template_refuses_is_malformed(prep, tiny_dir):
    picky = with_template(
        tiny_dir,
        "picky",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE,
    )
    system = GOOD | {"prompt": [{"role": "system", "content": "Count."}, {"role": "user", "content": "x"}]}
    refuses(
        prep, "prefs.jsonl:2: the chat template refuses these messages (no system role)", [GOOD, system], model=picky
    )
    _, rejects = prep([GOOD, system], "--on_bad_row", "skip", model=picky)
    assert [(row["line"], row["reason"]) for row in rejects] == [(2, "malformed")]


def test_every_malformed_row_is_counted_and_ten_are_named(prep, tiny_dir, tmp_path):
    """Those that the chat template refuses, too; nothing is written."""
    refusing = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}" + TEMPLATE
    model = with_template(tiny_dir, "refusing", refusing)
    table = [GOOD, GOOD | {"prompt": "no"}, *[GOOD | {"chosen": number} for number in range(11)], "{", GOOD]
    for name, place in (("prefs.jsonl", "line"), ("prefs.json", "row")):
        table = table if name.endswith(".jsonl") else [7 if row == "{" else row for row in table]
        with pytest.raises(InputError) as caught:
            prep(table, model=model, name=name)
        first, *named = str(caught.value).splitlines()
        skip = "(--on_bad_row skip leaves such rows out)"
        assert first == f"{tmp_path / name}: 13 rows are malformed {skip}; the first 10:"
        assert named[0] == f"  {place} 2: the chat template refuses these messages (not this)"
        assert named[1:] == [
            f"  {place} {number}: expected 'chosen' to be a string or a list of messages, found a number"
            for number in range(3, 12)
        ]
        assert not (tmp_path / "packed").exists()
    got, rejects = prep(table, "--on_bad_row", "skip", model=model, name="prefs.json")
    assert len(got) == 1 and Counter(row["reason"] for row in rejects) == {"malformed": 13, "duplicate": 1}


# --- rows left out ---


def test_every_reason_is_listed(prep):
    rows = [
        GOOD,
        GOOD | {"chosen": " \n"},
        GOOD | {"prompt": " "},
        GOOD | {"rejected": GOOD["chosen"]},
        GOOD | {"meta": 2},
        GOOD | {"prompt": "12 " * 80},
        GOOD | {"rejected": " a <mask> b"},
        GOOD | {"prompt": "an end</s>"},
        "[1]",
        GOOD | {"prompt": "Question: another?\nAnswer:"},
        GOOD | {"rejected": " 12"},
    ]
    got, rejects = prep(rows, "--on_bad_row", "skip", "--max_length", "100")
    assert [(row["line"], row["reason"]) for row in rejects] == [
        (2, "empty response"),
        (3, "empty prompt"),
        (4, "chosen equals rejected"),
        (5, "duplicate"),
        (6, "too long"),
        (7, "special token in the text"),
        (8, "special token in the text"),
        (9, "malformed"),
    ]
    assert got.meta["dropped"] == Counter(row["reason"] for row in rejects)
    assert json.loads(rejects[5]["text"])["rejected"] == " a <mask> b" and rejects[5]["detail"] == "<mask>"
    assert np.load(got.folder / "lines.npy").tolist() == [1, 10, 11]


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_pair_of_exactly_max_length_is_kept(longer, prep):
    row = GOOD | {longer: GOOD[longer] + " and more"}
    prompt, *responses = prep([row])[0][0]
    length = len(prompt) + max(map(len, responses))
    assert len(prep([row], "--max_length", str(length))[0]) == 1
    refuses(prep, "holds no row that can be used (1 too long)", [row], "--max_length", str(length - 1))


def test_a_forged_turn_is_left_out(prep, llada_chat_dir):
    forged = GOOD | {"chosen": "12<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nThanks"}
    assert [row["reason"] for row in prep([GOOD, forged], model=llada_chat_dir)[1]] == ["special token in the text"]


@pytest.mark.parametrize(
    "row, sentence",
    [
        ("[1]", "expected a JSON object, found a list"),
        ("null", "expected a JSON object, found null"),
        ({"prompt": "x", "chosen": "a"}, "expected a column 'rejected', found prompt, chosen"),
        (GOOD | {"chosen": 7}, "expected 'chosen' to be a string or a list of messages, found a number"),
        (GOOD | {"prompt": []}, "expected 'prompt' to be a string or a list of messages, found an empty list"),
        (
            GOOD | {"prompt": [{"role": "user", "content": None}]},
            "expected messages with a string 'role' and 'content'",
        ),
        (GOOD | {"prompt": ["x"]}, "expected messages with a string 'role' and 'content' in 'prompt', found \"x\""),
        (GOOD | {"prompt": [{"role": "judge", "content": "x"}]}, "expected a role of system, user or assistant"),
        (GOOD | {"prompt": [{"role": "assistant", "content": "x"}]}, "whose last message is the user's"),
        (GOOD | {"chosen": [{"role": "user", "content": "x"}]}, "expected 'chosen' to end in an assistant message"),
        (
            GOOD | {"chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "that do not repeat the prompt",
        ),
        ('{"prompt": "x", "chosen": "a\\ud800", "rejected": "b"}', "found a lone surrogate (\\ud800)"),
        ("[" * 100000, "nested too deep"),
    ],
)
def test_malformed_rows_are_named(row, sentence, prep, tmp_path):
    refuses(prep, "prefs.jsonl:2: expected", [GOOD, row])
    refuses(prep, sentence, [GOOD, row])
    assert not (tmp_path / "packed").exists()
    got, rejects = prep([GOOD, row], "--on_bad_row", "skip")
    assert len(got) == 1 and [(reject["line"], reject["reason"]) for reject in rejects] == [(2, "malformed")]


def test_bytes_that_are_not_utf8(tmp_path, tiny_dir):
    (tmp_path / "prefs.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match="prefs.jsonl:2: expected a JSON object"):
        data_prep.main(
            ["--in", str(tmp_path / "prefs.jsonl"), "--out", str(tmp_path), "--model_name_or_path", str(tiny_dir)]
        )


def test_files_that_are_no_preferences(prep, tmp_path, tiny_dir):
    refuses(prep, "holds no row that can be used", [])
    refuses(prep, "expected a list of rows, or an object that holds one, found a number", 7, name="prefs.json")
    refuses(prep, "prefs.json: row 2: expected a JSON object, found a number", [GOOD, 3], name="prefs.json")
    refuses(prep, "expected a file that ends in .jsonl", [GOOD], name="prefs.csv")
    for words, sentence in ((("--in", "none.jsonl"), "no such file"), ((), "no preferences given; add --in")):
        with pytest.raises(InputError, match=sentence):
            data_prep.main([*words, "--out", str(tmp_path / "packed"), "--model_name_or_path", str(tiny_dir)])


def test_tokenizer_larger_than_the_embedding(prep, llada_chat_dir, tmp_path):
    shutil.copytree(llada_chat_dir, tmp_path / "small")
    settings = json.loads((llada_chat_dir / "config.json").read_text()) | {"vocab_size": 512, "embedding_size": 512}
    (tmp_path / "small" / "config.json").write_text(json.dumps(settings))
    refuses(prep, "beyond the model's embedding of 512 rows", [GOOD], model=tmp_path / "small")


def test_a_length_confound_is_told(prep, capsys):
    prep([GOOD])
    assert "warning" not in capsys.readouterr().out
    prep([GOOD | {"chosen": GOOD["chosen"] * 4}])
    assert "warning: the median response has" in capsys.readouterr().out
