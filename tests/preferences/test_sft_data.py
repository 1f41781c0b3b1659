"""Tests of SFT data: every form of a row through data_prep's own command, what refuses it, and training on it.

bash tests/run.sh tests/preferences/test_sft_data.py
"""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from small import EOS, MASK, ROOT, call, flags, log, make_model, refusal, run

import calibrate
import config
import data_prep
import score
import train_dpo
from files import InputError
from models import checkpoint
from models.families import Masking
from preferences import forms, packed, rows
from preferences.sources import Row
from reasoning import tasks
from scoring import noise, objective
from training import engine

USER, SAID = [{"role": "user", "content": "Q"}], [{"role": "assistant", "content": "good"}]
FIRST = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *USER]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}]
FORMS = {  # name of the test: (form printed, row, (prompt, response))
    "strings": ("prompt, response", {"prompt": "Q", "response": "good"}, ("Q", "good")),
    "TRL": ("prompt, completion", {"prompt": "Q", "completion": "good"}, ("Q", "good")),
    "TRL's messages": ("prompt, completion", {"prompt": USER, "completion": SAID}, (USER, "good")),
    "a prompt that is repeated": ("prompt, response", {"prompt": USER, "response": USER + SAID}, (USER, "good")),
    "GSM8K": ("question, answer", {"question": "Q", "answer": "good"}, ("Q", "good")),
    "alpaca": (
        "instruction, output",
        {
            "instruction": "Add.",
            "input": "1 2",
            "output": "good",
            "text": "Follow it: Add.\nInput: 1 2\nResponse: good",
        },
        ("Add.\n1 2", "good"),
    ),
    "alpaca without input": ("instruction, output", {"instruction": "Q", "input": "", "output": "good"}, ("Q", "good")),
    "alpaca with history": (
        "instruction, output",
        {"instruction": "Q", "history": [["Hi", "Hello"]], "output": "good"},
        (FIRST, "good"),
    ),
    "messages": ("messages", {"messages": USER + SAID}, (USER, "good")),
    "turns, with the prompt beside them": ("messages", {"prompt": "Hi", "messages": FIRST + SAID}, (FIRST, "good")),
    "messages from and value": ("messages", {"messages": SHAREGPT}, (USER, "good")),
    "ShareGPT": ("conversations", {"conversations": SHAREGPT}, (USER, "good")),
    "system": (
        "question, answer",
        {"system": "S", "question": "Q", "answer": "good"},
        ([{"role": "system", "content": "S"}, *USER], "good"),
    ),
    "hh-rlhf's turns": (
        "prompt, response",
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "response": " good"},
        (USER, "good"),
    ),
}
GOOD = {"prompt": "Question: how many?\nAnswer:", "response": " 7 + 5 = 12\n#### 12"}


@pytest.fixture(scope="module")
def model(tiny_dir, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), tiny_dir)


def write_rows(path, table):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in table))
    return path


def packing(source, out, model):
    """The arguments of data_prep.py that pack SFT rows."""
    return ["--task", "sft", "--in", source, "--out", out, "--model_name_or_path", model]


def prep(source, out, model, *more):
    """(Packed, rejects) of data_prep.py with packing(); rows in = kept + listed."""
    call(data_prep.main, *packing(source, out, model), *more)
    got, listed = packed.Packed(out), [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert got.meta["task"] == got.task == "sft" and (got.bounds[:, 3] == got.bounds[:, 2]).all()
    assert got.meta["rows"] == got.meta["kept"] + len(listed) == len(got) + sum(got.meta["dropped"].values())
    return got, listed


def pairs_of(number):
    """Preferences, and the same as SFT rows."""
    table = list(tasks.preference_rows(number, "train", 0))
    return table, [{"prompt": row["prompt"], "response": row["chosen"]} for row in table]


# --- the rows ---


@pytest.mark.parametrize("name", FORMS)
def test_forms(name, chat_dir, tmp_path, capsys):
    """Named in the output and in meta.json; as .jsonl, .json and .parquet the same arrays."""
    import pyarrow
    import pyarrow.parquet

    form, row, want = FORMS[name]
    columns, found = forms.find_columns("sft", [Row(1, row)], {}, "x")
    assert found == form and rows.demonstration(row, columns, True) == (want[0], [want[1]])
    other = json.loads(json.dumps(row).replace("good", "very good"))
    sources = {name: tmp_path / name for name in ("a.jsonl", "a.json", "a.parquet")}
    write_rows(sources["a.jsonl"], [row, other])
    sources["a.json"].write_text(json.dumps([row, other]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, other]), sources["a.parquet"])
    made = set()
    for name, source in sources.items():
        got, listed = prep(source, tmp_path / "out" / name, chat_dir)
        assert (
            got.meta["form"] == form and len(got) == 2 and not listed and f"form: {form}\n" in capsys.readouterr().out
        )
        made.add((got.tokens.tobytes(), got.bounds.tobytes()))
    assert len(made) == 1


@pytest.mark.parametrize(
    "row, words",
    [
        (
            {"prompt": "Q", "chosen": "a", "rejected": "b"},
            "these look like preferences, which are packed without --task sft",
        ),
        (
            {"text": "x"},
            "no known form of --task sft has these columns; the columns are text; name yours with --columns prompt=...",
        ),
        ({"messages": USER}, "expected 'messages' to end in an assistant message, found role 'user'"),
        ({"messages": SAID}, "expected 'messages' to have messages before the last, found none"),
        ({"messages": "Q"}, "expected 'messages' to be a list of messages, found a string"),
        ({"messages": FIRST[:2] + SAID}, "whose last message is the user's"),
        ({"prompt": USER, "completion": FIRST + SAID}, "found 4 messages that do not repeat the prompt"),
        ({"prompt": "Q", "response": 7}, "expected 'response' to be a string or a list of messages, found a number"),
        ('{"prompt": "Q", "response": "a\\ud800"}', "found a lone surrogate"),
        ({"messages": USER + SAID}, "conversational rows need a chat template"),
    ],
)
def test_refusals(row, words, tiny_dir, tmp_path, capsys):
    source = write_rows(tmp_path / "x.jsonl", [row])
    said = refusal(data_prep.main, capsys, *packing(source, tmp_path / "out", tiny_dir))
    assert words in said and str(source) in said and not (tmp_path / "out").exists()


def test_single_responses_are_no_preferences(tiny_dir, tmp_path, capsys):
    for row in (GOOD, {"question": "Q", "answer": "A"}, {"messages": USER + SAID}):
        source = write_rows(tmp_path / "x.jsonl", [row])
        argv = ["--in", source, "--out", tmp_path / "out", "--model_name_or_path", tiny_dir]
        assert "look like single responses, which --task sft packs" in refusal(data_prep.main, capsys, *argv)
    said = refusal(data_prep.main, capsys, "--task", "sft", *argv, "--columns", "prompt=prompt,chosen=response")
    assert (
        "expected prompt=NAME,response=NAME,system=NAME,history=NAME,context=NAME,input=NAME, found 'chosen=response'"
        in said
    )
    assert "no SFT rows given; add --in" in refusal(data_prep.main, capsys, "--task", "sft", "--out", tmp_path / "out")


def test_every_reason_is_listed(tiny_dir, tmp_path):
    table = [
        GOOD,
        GOOD | {"response": " \n"},
        GOOD | {"prompt": " "},
        GOOD | {"meta": 2},
        GOOD | {"prompt": "12 " * 80},
        GOOD | {"response": " a <mask> b"},
        GOOD | {"prompt": "an end</s>"},
        "[1]",
        {"prompt": "x"},
        "{",
        GOOD | {"response": " 12"},
    ]
    source = write_rows(tmp_path / "sft.jsonl", table)
    with pytest.raises(
        InputError, match="3 rows are malformed .*\n  line 8: expected a JSON object, found a list\n  line 9"
    ):
        prep(source, tmp_path / "out", tiny_dir)
    got, listed = prep(source, tmp_path / "out", tiny_dir, "--on_bad_row", "skip", "--max_length", 100)
    assert [(row["line"], row["reason"]) for row in listed] == [
        (2, "empty response"),
        (3, "empty prompt"),
        (4, "duplicate"),
        (5, "too long"),
        (6, "special token in the text"),
        (7, "special token in the text"),
        (8, "malformed"),
        (9, "malformed"),
        (10, "malformed"),
    ]
    assert np.load(got.folder / "lines.npy").tolist() == [1, 11]
    length = max(len(prompt) + len(response) for prompt, response, _ in (got[0], got[1]))  # nothing is truncated
    assert len(prep(source, tmp_path / "out", tiny_dir, "--on_bad_row", "skip", "--max_length", length)[0]) == 2
    assert len(prep(source, tmp_path / "out", tiny_dir, "--on_bad_row", "skip", "--max_length", length - 1)[0]) == 1


def test_columns(tiny_dir, tmp_path, capsys):
    """Preferences serve, their rejected responses unread; a whole dialogue may have any name."""
    pairs, sft = pairs_of(5)
    got, _ = prep(write_rows(tmp_path / "prefs.jsonl", pairs), tmp_path / "a", tiny_dir, "--columns", "response=chosen")
    want, _ = prep(write_rows(tmp_path / "sft.jsonl", sft), tmp_path / "b", tiny_dir)
    assert (got.tokens == want.tokens).all() and got.meta["fingerprint"] == want.meta["fingerprint"]
    columns = {"response": "turns"}
    assert forms.find_columns("sft", [Row(1, {"turns": SHAREGPT})], columns, "x") == (columns, "--columns")
    said = refusal(
        data_prep.main, capsys, "--task", "sft", "--in", tmp_path / "sft.jsonl", "--columns", "response=solution"
    )
    assert "no column 'solution'; the columns are prompt, response" in said


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "A", "label": False},
        {"prompt": "Q", "response": "A", "score": 0.1},
        {"instruction": "Q", "output": "A", "kto_tag": False},  # LLaMA-Factory's
        {"prompt": "Q", "response": "A", "correct": False},  # evaluate.py's
    ],
)
def test_judged_rows_are_not_learnt_unsaid(tiny_dir, tmp_path, capsys, row):
    """KTO's and a judge's rows hold bad responses; with --columns they were meant."""
    argv = packing(write_rows(tmp_path / "rows.jsonl", [row]), tmp_path / "out", tiny_dir)
    said = refusal(data_prep.main, capsys, *argv)
    assert "make_prefs.py --strategy label" in said and said.endswith("response=" + list(row)[1])
    call(data_prep.main, *argv, "--columns", said.rpartition("--columns ")[2])
    assert "1 rows, 1 kept" in capsys.readouterr().out


def test_reuse_notices_the_task(tiny_dir, tmp_path, capsys):
    row, out = {"prompt": "Q", "response": "A", "chosen": "A", "rejected": "B"}, tmp_path / "out"
    source = write_rows(tmp_path / "both.jsonl", [row])

    def again(*more):
        capsys.readouterr()
        call(data_prep.main, "--reuse", "--out", out, "--model_name_or_path", tiny_dir, *more)
        return capsys.readouterr().out

    given = ["--in", source]
    assert "1 rows, 1 kept" in again(*given)
    said = refusal(data_prep.main, capsys, "--reuse", "--task", "sft", "--out", out, "--model_name_or_path", tiny_dir)
    assert f"{out}: holds preferences, and --task sft was given" in said and "--task sft --in sft.jsonl" in said
    assert "1 pairs, up to date" in again(*given)
    assert "1 rows, 1 kept" in again(*given, "--task", "sft")
    assert "1 SFT rows, up to date" in again(*given, "--task", "sft") and "1 SFT rows, up to date" in again()
    assert "1 rows, 1 kept" in again(*given)


# --- what is trained ---


def plain(model):
    """The model in float32, not in an engine: DeepSpeed makes one a process."""
    return checkpoint.load_model(str(model), torch.float32).eval()


@torch.no_grad()
def loss_of(made, policy, batch):
    rows = made.responses(batch)
    tokens = sum(states.tokens for states in rows)
    scores = score.state_scores(policy, rows, tokens, engine.Ranks(0, 1, torch.device("cpu")))
    return made.loss(batch)([each.sum() for each in scores])


def test_the_same_ids_and_losses_as_the_chosen_of_preferences(model, tmp_path, monkeypatch):
    """The noise is keyed by a row's whole content; keyed by prompt and chosen, SFT is the same to the last digit."""
    pairs, sft = pairs_of(40)
    source = write_rows(tmp_path / "prefs.jsonl", pairs)
    call(data_prep.main, "--in", source, "--out", tmp_path / "prefs", "--model_name_or_path", model)
    sft, _ = prep(write_rows(tmp_path / "sft.jsonl", sft), tmp_path / "sft", model)
    prefs = packed.Packed(tmp_path / "prefs")
    assert len(prefs) == len(sft) == 40 and prefs.task == "preferences"
    for (prompt, chosen, _), (same, response, rejected) in zip(prefs, sft, strict=True):
        assert prompt.tolist() == same.tolist() and chosen.tolist() == response.tolist() and not len(rejected)
    monkeypatch.setattr(packed.Packed, "content", lambda self, index: np.concatenate(self[index][:2]))
    policy, losses = plain(model), []
    for data in (prefs, sft):  # two epochs of what training scores, from its own order of the rows
        made = objective.SFT(config.TrainArguments(sft_pad_to=40), config.NoiseArguments(), data, Masking(MASK))
        train, held = objective.split(data, 0.2, 42)
        stream = objective.Stream(train, 42, 4, made.lengths)
        items = [stream[place] for place in range(2 * len(train))]
        batches = [items[first : first + 4] for first in range(0, len(items), 4)]
        losses.append([held.tolist(), *(loss_of(made, policy, batch).item() for batch in batches)])
    assert losses[0] == losses[1] and len(losses[0]) > 10 and all(loss > 0 for loss in losses[0][1:])


@pytest.mark.parametrize("pad_to", [0, 40])
def test_the_loss_is_that_of_lladas_guidelines(pad_to, model, tmp_path):
    """-log p of every hidden token over p n, eos after the response hidden and counted in n, the mean over the rows."""
    sft, _ = prep(write_rows(tmp_path / "sft.jsonl", pairs_of(6)[1]), tmp_path / "sft", model)
    made = objective.SFT(config.TrainArguments(sft_pad_to=pad_to), config.NoiseArguments(), sft, Masking(MASK))
    batch = [(index, 0) for index in range(6)]
    rows, policy = made.responses(batch), plain(model)
    longest = max(len(prompt) + max(len(response), pad_to) for prompt, response, _ in sft)
    assert [states.inputs.shape for states in rows] == [(1, longest)] * 6
    want, hidden_eos = [], 0
    for row, (prompt, response, _) in zip(
        torch.tensor(np.concatenate([states.inputs for states in rows])), sft, strict=True
    ):
        whole = torch.tensor([*prompt.tolist(), *response.tolist()] + [EOS] * (longest - len(prompt) - len(response)))
        hidden = row == MASK
        assert not hidden[: len(prompt)].any() and (row[~hidden] == whole[~hidden]).all()
        hidden_eos += int(hidden[len(prompt) + len(response) :].sum())
        rate = 0.001 + 0.999 * noise.generator(0, sft.content(len(want)), "sft", 0).random()
        with torch.no_grad():
            logps = policy(input_ids=row[None]).logits[0].float().log_softmax(-1)
        missing = -logps[torch.arange(longest), whole][hidden].sum()
        want.append(float(missing) / rate / (longest - len(prompt)))
    assert hidden_eos and float(loss_of(made, policy, batch)) == pytest.approx(np.mean(want), rel=1e-5)


def test_scripts_from_rows_to_a_model(model, tmp_path):
    """The two commands as they are typed, and a resumed run without --task. A loss of preferences is refused."""
    source, out, home = write_rows(tmp_path / "sft.jsonl", pairs_of(30)[1]), tmp_path / "packed", tmp_path / "run"
    said = run([ROOT / "data_prep.py", *packing(source, out, model)])
    assert f"{source}: 30 rows, 30 kept, 0 dropped" in said and "warning: the median" not in said
    words = shlex.join(map(str, packing(source, out, model)))
    assert f"next: bash launch.sh ds_configs/zero3_offload_4080.json --loss_type sft {words}" in said
    lines = [line.split()[0] for line in said.splitlines() if line]
    assert lines.count("prompt") == lines.count("response") == 2 and not {"chosen", "rejected"} & set(lines)
    argv = ["--data", out, "--output_dir", home]
    argv += flags(
        use_mixed_precision="no",
        max_steps=2,
        eval_fraction=0.2,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        sft_pad_to=40,
        save_steps=1,
    )
    said = run([ROOT / "score.py", "--loss_type", "sft", "--task", "sft", *argv])
    assert "loss_type sft needs no reference scores" in said
    said = run([ROOT / "train_dpo.py", "--loss_type", "sft", "--task", "sft", *argv])
    assert (
        "24 rows to train on, 6 held out, 2 steps of 4 rows" in said and (home / "final" / "model.safetensors").exists()
    )
    assert [line["step"] for line in log(home)] == [1, 2] and all(line["loss"] > 0 for line in log(home))
    assert log(home)[-1]["eval_loss"] > 0
    shutil.rmtree(home / "final")
    said = run([ROOT / "train_dpo.py", "--loss_type", "sft", *argv])
    assert "resuming after step 2" in said and (home / "final").exists()  # nothing was left but to write it
    for script, more in (("train_dpo.py", []), ("train_dpo.py", ["--loss_type", "ipo"])):
        said = run([ROOT / script, *argv, *more], code=2)
        assert said.count("error: ") == 1 and "Traceback" not in said
        assert f"{out}: holds SFT rows, expected preferences; pack those into another folder" in said


def test_what_needs_preferences_refuses_sft_data(model, tmp_path, capsys):
    out = prep(write_rows(tmp_path / "sft.jsonl", pairs_of(4)[1]), tmp_path / "packed", model)[0].folder
    before = sorted(path.name for path in out.iterdir())
    for main, more in ((score.main, []), (score.main, ["--diffusion_steps", "auto"]), (calibrate.main, [])):
        said = refusal(main, capsys, "--data", out, *more)
        assert said.startswith(f"error: {out}: holds SFT rows")
        assert said.endswith("or give --loss_type sft")
    assert sorted(path.name for path in out.iterdir()) == before
    for more in ([], ["--loss_type", "hinge", "--diffusion_steps", "auto"]):
        assert f"{out}: holds SFT rows" in refusal(
            train_dpo.main, capsys, "--data", out, "--output_dir", tmp_path / "run", *more
        )
    argv = flags(data=out, loss_type="sft", diffusion_steps="auto")  # SFT takes no steps: nothing to calibrate
    assert isinstance(train_dpo.prepare(train_dpo.read_arguments(argv))[0], objective.SFT)


def test_real_gsm8k(shared, tiny_dir, tmp_path):
    got, _ = prep(shared / "gsm8k" / "test.jsonl", tmp_path / "out", tiny_dir, "--max_length", 8192)
    assert got.meta["form"] == "question, answer" and len(got) == got.meta["rows"] == 1319
