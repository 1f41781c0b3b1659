"""Tests of KTO: rows of --task kto, their mismatched responses, and steps against plain AdamW on the paper's formula.

bash tests/run.sh tests/training/test_kto.py
"""

import functools
import json

import numpy as np
import plain
import pytest
import torch
from small import LENGTHS, call, ds_config, flags, log, make_model, make_pairs, pack, refusal, run_jobs

import data_prep
import score
import train_dpo
from preferences import packed

T, R = 3, 2
STATES = flags(estimator="spread", diffusion_steps=T, trajectories=R, use_mixed_precision="no")
WEIGHTS = 0.75, 1.5  # of an undesirable row and of a desirable one
RUN = flags(
    loss_type="kto",
    beta=0.05,
    desirable_weight=WEIGHTS[True],
    undesirable_weight=WEIGHTS[False],
    learning_rate=0.01,
    lr_scheduler_type="constant",
    warmup_ratio=0,
    max_grad_norm=0.1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=3,
    eval_fraction=0.25,
    tokens_per_forward=150,
)
LABELS = [index % 3 == 0 for index in range(len(LENGTHS))]


# --- steps --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_dir, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("kto") / "model", tiny_dir)


@pytest.fixture(scope="module", params=[(1, "zero0"), (2, "zero3_offload_4080")], ids=["1-rank", "2-ranks"])
def runs(request, model, tmp_path_factory):
    """(ranks, folder, data, what the ranks did) of a run."""
    (world, stage), folder = request.param, tmp_path_factory.mktemp("runs")
    data = pack(folder / "packed", make_pairs(LENGTHS, seed=7), model, LABELS)
    base = ["--data", data, *STATES]
    more = [*base, *RUN, "--deepspeed", ds_config(folder / "ds.json", stage, eps=1e-3)]
    jobs = [("score", "score", [*base, "--tokens_per_forward", 99])]
    jobs += [("whole", "train_dpo", [*more, "--output_dir", folder / "whole"])]
    did = run_jobs(folder / "out", world, jobs)
    for name, ranks in did.items():
        assert [rank["error"] for rank in ranks] == [""] * world, name
    return world, folder, data, did


def test_steps_are_plain_adamw(runs, model):
    """KL is the mean over the rows of all ranks, and no gradient goes through it; the loss has the weights."""
    world, folder, data, did = runs
    rows, [reveal] = plain.read_packed(data), plain.read_reference(data, dtype="no")[0]
    batches = []
    for step in range(3):
        items = [index for rank in did["whole"] for index, _ in rank["items"][str(step)]]
        assert len(items) == 4 * world
        batches.append([(rows[index], reveal[index], LABELS[index]) for index in items])
    losses_of = functools.partial(kto_losses, plain.load(model))
    adam = {"rates": [0.01] * 3, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0, "clip": 0.1}
    lines, largest = log(folder / "whole"), 0
    for step, (loss, norm, weights) in enumerate(plain.train(plain.load(model), losses_of, batches, **adam)):
        assert lines[step]["loss"] == pytest.approx(loss, rel=1e-5)
        assert lines[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        got = torch.load(folder / "out" / f"whole.step-{step + 1}.pt")
        assert max(float((got[name].double() - weights[name]).abs().max()) for name in weights) < 1e-5
        largest = max(largest, lines[step]["kl"])
    assert largest > 0.1  # the mismatched responses matter here


def kto_losses(reference, model, batch):
    return plain.kto_losses(model, reference, batch, T, beta=0.05, weights=WEIGHTS)


def test_score_names_the_loss(runs, capsys):
    call(score.main, "--data", runs[2], *STATES, "--noise_seed", 1)
    assert "next: python train_dpo.py --loss_type kto --data" in capsys.readouterr().out


def test_metrics(runs, capsys):
    """Of the first step all is known: no gain, no KL. Held-out rows are those of scores.jsonl."""
    _, folder, data, _ = runs
    first, *_, last = log(folder / "whole")
    assert first["kl"] == pytest.approx(0, abs=1e-4) and first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    rows = [json.loads(line) for line in (folder / "whole" / "scores.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "eval"]
    gains = np.array([np.sum(row["policy"]) - np.sum(row["ref"]) for row in rows])
    labels = np.array([row["label"] for row in rows])
    assert labels.any() and not labels.all()
    assert [LABELS[row["pair"]] for row in rows] == labels.tolist()
    assert last["eval_rewards/chosen"] == pytest.approx(0.05 * gains[labels].mean(), abs=1e-4)
    assert last["eval_rewards/rejected"] == pytest.approx(0.05 * gains[~labels].mean(), abs=1e-4)
    margin = last["eval_rewards/chosen"] - last["eval_rewards/rejected"]
    assert last["eval_rewards/margins"] == pytest.approx(margin)
    right = (gains > last["eval_kl"]) == labels
    assert last["eval_rewards/accuracies"] == pytest.approx(right.mean())
    card = (folder / "whole" / "final" / "README.md").read_text()
    assert "after KTO" in card and "| desirable_weight | 1.5 |" in card and "- kto" in card


def test_data_of_another_task(runs, model, tmp_path, capsys):
    """Pairs are not judged responses, and the other way round; each sentence says how to pack the right data."""
    pairs = pack(tmp_path / "pairs", make_pairs(LENGTHS[:4]), model)
    said = refusal(train_dpo.main, capsys, "--data", pairs, "--loss_type", "kto", "--output_dir", tmp_path / "run")
    assert f"{pairs}: holds preferences, expected judged responses" in said and "--task kto" in said
    said = refusal(train_dpo.main, capsys, "--data", runs[2], "--output_dir", tmp_path / "run")
    assert "holds judged responses, expected preferences" in said and "--loss_type kto" in said
    said = refusal(train_dpo.main, capsys, "--data", runs[2], "--loss_type", "sft", "--output_dir", tmp_path / "run")
    assert "holds judged responses, expected SFT rows" in said
    said = refusal(train_dpo.main, capsys, "--data", runs[2], "--loss_type", "kto,sft")
    assert "kto trains on single responses" in said
    said = refusal(train_dpo.main, capsys, "--data", runs[2], "--loss_type", "kto", "--ld_alpha", 0.5)
    assert "judged responses have no pairs" in said


# --- rows ---------------------------------------------------------------------------------------------------


def prep(tmp_path, rows, *more):
    """The Packed of rows that data_prep.py packs for KTO."""
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not call(data_prep.main, "--task", "kto", "--in", path, "--out", tmp_path / "packed", *more)
    return packed.Packed(tmp_path / "packed")


ASKED, SAID = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    "good, bad",
    [
        ({"prompt": "P1", "completion": "A", "label": True}, {"prompt": "P2", "completion": "B", "label": False}),
        ({"prompt": "P1", "completion": "A", "label": 1}, {"prompt": "P2", "completion": "B", "label": -1}),
        (
            {"prompt": "P1", "completion": [SAID], "label": "true"},
            {"prompt": "P2", "completion": [SAID], "label": "False"},
        ),
        (
            {"instruction": "P1", "input": "", "output": "A", "kto_tag": True},
            {"instruction": "P2", "input": "", "output": "B", "kto_tag": False},
        ),
    ],
)
def test_forms(tmp_path, good, bad):
    data = prep(tmp_path, [good, bad, bad])
    assert data.task == "kto" and data.labels().tolist() == [True, False]  # the third row is a duplicate
    (first, own, other), (second, theirs, mine) = data[0], data[1]
    assert first.tolist() != second.tolist()
    assert other.tolist() == theirs.tolist() and mine.tolist() == own.tolist()


def test_both_responses_of_a_pair(tmp_path):
    """A chosen response that two pairs share is one row; the same text may be judged both ways."""
    pairs = [("P1", "A", "B"), ("P1", "A", "C"), ("P2", "D", "A")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]
    data = prep(tmp_path, rows)
    assert data.labels().tolist() == [True, False, False, True, False]
    assert data.lines().tolist() == [1, 1, 2, 3, 3]


def test_a_mismatched_response_is_of_another_prompt_and_fits(tmp_path, capsys):
    rows = [
        {"prompt": f"P{index % 3}", "completion": "A " * (1 + index), "label": index % 2 == 0} for index in range(9)
    ]
    data = prep(tmp_path, rows)
    own = {tuple(response.tolist()): tuple(prompt.tolist()) for prompt, response, _ in data}
    assert len(own) == 9
    for prompt, _, other in data:
        assert own[tuple(other.tolist())] != tuple(prompt.tolist())
    # two prompts, of which one is so long that only the shortest other response fits beside it
    long = {"prompt": "word " * 40, "completion": "A", "label": True}
    short = [{"prompt": "P", "completion": "B " * count, "label": False} for count in (1, 30)]
    most = max(len(np.concatenate(row[:2])) for row in prep(tmp_path, [long, *short])) + 2
    data = prep(tmp_path, [long, *short], "--max_length", most)
    assert len(data) == 3 and len(data[0][2]) < 6
    said = refusal(data_prep.main, capsys, *flags(task="kto", out=tmp_path / "x"), "--in", one_prompt(tmp_path))
    assert "holds no row that can be used (2 no other prompt)" in said


def one_prompt(tmp_path):
    path = tmp_path / "one.jsonl"
    rows = [{"prompt": "P", "completion": text, "label": True} for text in "AB"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_said_of_labels(tmp_path, capsys):
    rows = [{"prompt": f"P{index}", "completion": "A", "label": index < 4} for index in range(5)]
    prep(tmp_path, rows)
    said = capsys.readouterr().out
    data = prep(tmp_path, [*rows, rows[0] | {"completion": "B", "label": None}])
    assert len(data) == 5 and data.meta["dropped"] == {"no label": 1}
    assert "4  desirable" in said and "1  undesirable" in said and "--undesirable_weight 4.00" in said
    path = tmp_path / "judged.jsonl"
    path.write_text(json.dumps(rows[0] | {"label": "maybe"}) + "\n")
    said = refusal(data_prep.main, capsys, "--task", "kto", "--in", path, "--out", tmp_path / "other")
    assert "expected 'label' to be true or false, found \"maybe\"" in said
    path.write_text(json.dumps(rows[0]) + "\n")
    said = refusal(data_prep.main, capsys, "--in", path, "--out", tmp_path / "other")
    assert "--task kto packs them" in said
