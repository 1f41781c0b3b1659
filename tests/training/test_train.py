"""Tests of train_dpo.py and training/engine.py: real runs, against plain AdamW on the formula in plain.py.

    bash tests/run.sh tests/training/test_train.py

Each of 1 and 2 ranks is started once and makes its runs one after the other (worker.py). A run that is stopped is a
process of its own.
"""

import functools
import json
import math
import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
from safetensors.torch import load_file
from small import (
    LENGTHS,
    ROOT,
    call,
    ds_config,
    flags,
    log,
    make_model,
    make_pairs,
    numbers,
    pack,
    refusal,
    run,
    run_jobs,
    start,
)

import config
import score
import train_dpo
from models import checkpoint, tokenization
from preferences import packed
from scoring import objective, passes

T, R = 3, 2  # S = 5
STATES = flags(estimator="spread", diffusion_steps=T, trajectories=R)
FP32, BF16 = (STATES + flags(use_mixed_precision=name) for name in ("no", "bf16"))
ADAM = {"eps": 1e-3}  # smooth: with 1e-8 a first step is the gradient's sign, and rounding decides it
RUN = flags(
    beta=0.05,
    learning_rate=0.01,
    lr_scheduler_type="cosine",
    warmup_ratio=0,
    weight_decay=0.1,
    adam_beta1=0.8,
    adam_beta2=0.95,
    max_grad_norm=0.5,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=3,
    eval_fraction=0.25,
    eval_steps=2,
)
MIXED, ALL = 150, 10**5  # tokens a forward: some pairs are whole and some divided; all of a step in one graph
PLAIN = ("zero0", "zero2", "zero3")
STAGES = (*PLAIN, "zero2_offload_4080", "zero3_offload_4080")
KINDS = [(stage, kind) for stage in PLAIN for kind in ("joint", "cut", "auto", "bf16")] + [
    (stage, kind) for stage in STAGES[3:] for kind in ("cut", "auto")
]


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return SimpleNamespace(folder=folder, model=make_model(folder / "model", tiny_dir))


@pytest.fixture(scope="module", params=[1, 2])
def runs(request, home):
    """Every stage, joint and segmented, and in bf16, on 1 or 2 ranks: `.did[name]` and the runs' folders."""
    world = request.param
    folder = home.folder / f"ranks-{world}"
    folder.mkdir()
    data = pack(folder / "packed", make_pairs(LENGTHS, seed=7), home.model)
    base, jobs = ["--data", data], []
    for name, dtype in (("score-no", FP32), ("score-bf16", BF16)):
        jobs.append((name, "score", base + dtype + ["--tokens_per_forward", 99]))
    for stage in STAGES:
        path = ds_config(folder / f"{stage}.json", stage, **ADAM)

        kinds = [("cut", FP32, {"tokens_per_forward": MIXED}), ("auto", FP32, {"tokens_per_forward": "auto"})]
        if stage in PLAIN:
            saving = {"save_steps": 1} if stage == "zero3" else {}
            kinds.append(("joint", FP32, {"tokens_per_forward": ALL, "gradient_checkpointing": False} | saving))
            kinds.append(("bf16", BF16, {"tokens_per_forward": 99}))
            kinds.append(("part", FP32, {"tokens_per_forward": MIXED, "backprop_steps": 3}))
        for kind, dtype, more in kinds:
            given = flags(deepspeed=path, output_dir=folder / f"{stage}-{kind}", **more)
            jobs.append((f"{stage}-{kind}", "train_dpo", [*base, *dtype, *RUN, *given]))
    did = run_jobs(folder / "out", world, jobs)
    for name, ranks in did.items():
        assert [rank["error"] for rank in ranks] == [""] * world, name
    return SimpleNamespace(world=world, folder=folder, data=data, did=did)


@pytest.fixture(scope="module")
def truth(runs, home):
    """(loss, norm, weights) of three steps of plain AdamW on the formula, over the pairs that the runs took."""
    pairs, [reveal] = plain.read_packed(runs.data), plain.read_reference(runs.data, dtype="no")[0]
    taken = runs.did["zero0-cut"]
    batches = [], [], []
    for step, batch in enumerate(batches):
        for rank in taken:
            batch += map(tuple, rank["items"][str(step)])
    for ranks in runs.did.values():  # the order of the data depends on nothing else
        assert all(
            rank["items"].get(str(s)) in (None, mine["items"][str(s)])
            for rank, mine in zip(ranks, taken)
            for s in range(3)
        )
    assert [len(batch) for batch in batches] == [4 * runs.world] * 3
    every = [item for batch in batches for item in batch]
    assert len(set(every)) == len(every), "a pair is taken twice in an epoch"
    assert runs.world == 1 or {index for index, epoch in every if epoch == 0} == set(range(19)) - held_out(runs)
    assert any(sorted(map(len, pairs[index][1:])) == [1, 200] for index, _ in every)
    parts = []
    for batch in batches:
        parts.append([(pairs[index], reveal[index]) for index, _ in batch])
    return list(
        plain.train(
            plain.load(home.model),
            functools.partial(pair_losses, plain.load(home.model)),
            parts,
            rates=(0.01, 0.0075, 0.0025),
            betas=(0.8, 0.95),
            eps=ADAM["eps"],
            weight_decay=0.1,
            clip=0.5,
        )
    )


def pair_losses(reference, model, batch):
    """The losses of [(pair, reveal)], each made when it is asked for."""
    return (plain.pair_loss(model, reference, pair, reveal, T, beta=0.05) for pair, reveal in batch)


def held_out(runs):
    return set(objective.split(packed.Packed(runs.data), 0.25, 42)[1].tolist())


# --- the optimizer's steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, cut", [kind for kind in KINDS if kind[1] != "bf16"])
def test_steps_are_plain_adamw(runs, truth, stage, cut):
    """Loss, gradient norm (before clipping) and weights of three steps, for any engine, accumulation and ranks."""
    name = f"{stage}-{cut}"
    for step, (loss, norm, weights) in enumerate(truth):
        line = log(runs.folder / name)[step]
        assert line["loss"] == pytest.approx(loss, rel=1e-5), step
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.5, step
        got = torch.load(runs.folder / "out" / f"{name}.step-{step + 1}.pt")
        assert got.keys() == weights.keys()
        for key, want in weights.items():
            assert float((got[key].double() - want).abs().max()) < 1e-5, (step, key)
    final = load_file(runs.folder / name / "final" / "model.safetensors")
    assert all(torch.equal(final[key], got[key]) for key in got)


def planned(runs, home, stage, kind, step):
    """[passes without a graph, with one, backward passes] of a step: the largest counts of any rank."""
    more = ["--backprop_steps", 3] if kind == "part" else []
    given = train_dpo.read_arguments(list(map(str, ["--data", runs.data, *FP32, *RUN, *more])))
    pairs, counts = train_dpo.prepare(given)[0], []
    for rank in runs.did[f"{stage}-{kind}"]:
        lengths, graph_lengths = [], []
        for item in rank["items"][str(step)]:
            responses = pairs.responses(tuple(item))
            lengths.append([row for states in responses for row in rows_of(states)])
            graph_lengths.append([row for states in responses for row in rows_of(states.with_gradient)])
        counts.append(passes.divide(lengths, graph_lengths, ALL if kind == "joint" else MIXED).counts)
    without, graph = (max(each) for each in zip(*counts))
    return [without, graph, graph], len(set(counts)) > 1


def rows_of(states):
    """The lengths of its rows that score something."""
    return [states.inputs.shape[1] for row in states.weight if row.any()]


def test_same_passes_on_every_rank(runs, home):
    """In training, in evaluation and in the reference job; one more or less and ZeRO-3 waits for ever.

    As many in each step as the busiest rank needs.
    """
    held = len(held_out(runs))
    assert runs.world == 1 or held % 2, "the last held-out pair leaves a rank idle"
    for name, ranks in runs.did.items():
        counts = [
            [rank[what] for what in ("forwards", "forwards_without_graph", "eval_forwards", "backwards", "passes")]
            for rank in ranks
        ]
        assert counts == counts[:1] * runs.world, name
        stage, _, kind = name.partition("-")
        if kind in ("joint", "cut", "part"):
            want = [planned(runs, home, stage, kind, step) for step in range(3)]
            assert ranks[0]["passes"] == {str(step): made for step, (made, _) in enumerate(want)}, name
            if kind == "cut":
                assert len({tuple(made) for made, _ in want}) > 1, "steps with different numbers of passes"
                assert runs.world == 1 or any(differ for _, differ in want), "ranks with different numbers"


def test_auto(runs):
    """What was tried and found is the run's, on every rank; the tries are passes of their own."""
    for stage in PLAIN:
        found = json.loads((runs.folder / f"{stage}-auto" / "run.json").read_text())["arguments"]["tokens_per_forward"]
        assert found > 10 * MIXED
        auto, joint = (runs.did[f"{stage}-{kind}"][0] for kind in ("auto", "joint"))
        assert auto["forwards"] > joint["forwards"] and auto["eval_forwards"] == joint["eval_forwards"]


def test_part_of_the_states(runs):
    """backprop_steps: the first loss is that of all states, at every stage; the gradient is another."""
    lines = {stage: log(runs.folder / f"{stage}-part") for stage in PLAIN}
    for stage in PLAIN:
        whole = log(runs.folder / f"{stage}-cut")
        assert lines[stage][0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-6)
        assert lines[stage][0]["grad_norm"] != pytest.approx(whole[0]["grad_norm"], rel=1e-3)
        assert [line["grad_norm"] for line in lines[stage]] == pytest.approx(
            [line["grad_norm"] for line in lines["zero0"]], rel=1e-4
        )


def test_first_step(runs):
    """Policy = reference: margin 0, loss ln 2, at every stage, in float32 and bfloat16."""
    for stage, kind in KINDS:
        loose, line = 1e-2 if kind == "bf16" else 1e-4, log(runs.folder / f"{stage}-{kind}")[0]
        assert line["loss"] == pytest.approx(math.log(2), abs=loose)
        assert line["rewards/margins"] == pytest.approx(0, abs=loose)
        assert line["rewards/chosen"] == pytest.approx(0, abs=loose) and line["logps/chosen"] < -1


def test_stages_agree(runs):
    """Step by step, in bf16 within its precision; and the runs learn."""
    for kind, loose in (("joint", 1e-5), ("cut", 1e-5), ("bf16", 5e-3)):
        losses = []
        for stage in (stage for stage, other in KINDS if other == kind):
            losses.append([line["loss"] for line in log(runs.folder / f"{stage}-{kind}")])
        losses = np.array(losses)
        np.testing.assert_allclose(losses, losses[:1].repeat(len(losses), 0), rtol=loose)
        assert (losses[:, -1] != losses[:, 0]).all()


def test_evaluation_is_the_formula(runs, truth, home):
    """Mean loss and accuracy over the held-out pairs, with the weights after step 3; the log's other numbers."""
    pairs, [reveal] = plain.read_packed(runs.data), plain.read_reference(runs.data, dtype="no")[0]
    weights, before = truth[-1][2], plain.load(home.model)
    with torch.no_grad():
        margins = []
        for index in sorted(held_out(runs)):
            prompt, *sides = pairs[index]
            win, lose = (
                plain.score(weights, prompt, side, steps, T) - plain.score(before, prompt, side, steps, T)
                for side, steps in zip(sides, reveal[index])
            )
            margins.append((0.05 * win.item(), 0.05 * lose.item()))
    for stage in STAGES:
        lines = log(runs.folder / f"{stage}-cut")
        line = lines[-1]
        assert line["eval_loss"] == pytest.approx(
            np.mean([-math.log(1 / (1 + math.exp(l - w))) for w, l in margins]), rel=1e-3
        )
        assert line["eval_rewards/chosen"] == pytest.approx(np.mean([w for w, _ in margins]), abs=1e-3)
        assert line["eval_rewards/margins"] == pytest.approx(np.mean([w - l for w, l in margins]), abs=1e-3)
        assert line["eval_rewards/accuracies"] == pytest.approx(np.mean([w > l for w, l in margins]))
        assert [line["step"] for line in lines] == [1, 2, 3] and "eval_loss" not in lines[0] and "eval_loss" in lines[1]
        taken = [index for rank in runs.did[f"{stage}-cut"] for items in rank["items"].values() for index, _ in items]
        tokens = sum(5 * (2 * len(pairs[i][0]) + len(pairs[i][1]) + len(pairs[i][2])) for i in taken)
        assert line["num_tokens"] == tokens and not set(taken) & held_out(runs)
        assert line["epoch"] == pytest.approx(len(taken) / (19 - len(held_out(runs))), abs=1e-4)


def test_final_loads(runs, home):
    """final/ is a Hugging Face folder with the trained weights, in each kind of number."""
    start = load_file(home.model / "model.safetensors")
    for stage, kind in KINDS:
        final, dtype = (
            str(runs.folder / f"{stage}-{kind}" / "final"),
            torch.bfloat16 if kind == "bf16" else torch.float32,
        )
        for key, value in checkpoint.load_model(final, dtype).state_dict().items():
            assert (value != start[key].to(dtype)).any(), key
        tokenization.load_tokenizer(final)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_learning_rate(shape):
    args = config.TrainArguments(learning_rate=2.0, warmup_ratio=0.3, lr_scheduler_type=shape)
    rates = [train_dpo.learning_rate(step, 10, args) for step in range(10)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2])
    want = {
        "cosine": [1 + math.cos(math.pi * i / 7) for i in range(7)],
        "linear": [2 - 2 * i / 7 for i in range(7)],
        "constant": [2] * 7,
    }[shape]
    assert rates[3:] == pytest.approx(want)
    assert train_dpo.learning_rate(0, 1, args) == 2  # one step: neither 0 nor a division by it


# --- stop and resume --------------------------------------------------------------------------------------


LONG = flags(
    diffusion_steps=T,
    trajectories=R,
    noise_sets=2,
    sft_weight=0.1,
    learning_rate=0.003,
    warmup_ratio=0.3,
    num_train_epochs=2,
    gradient_accumulation_steps=2,
    tokens_per_forward="auto",
    eval_fraction=0.3,
    eval_steps=3,
    save_steps=1,
    save_total_limit=0,
    beta=0.05,
)  # 5 pairs, 5 steps: the third crosses into the second epoch


@pytest.fixture(scope="module", params=["zero0-no", "zero0-bf16", "zero3_offload_4080-bf16"])
def whole(request, home):
    """An uninterrupted run of the real command line with a checkpoint a step; ds_configs as they are shipped."""
    folder, data = home.folder / f"whole-{request.param}", home.folder / "long"
    stage, dtype = request.param.split("-")
    if not data.exists():
        pack(data, make_pairs(LENGTHS[:8], seed=3), home.model)
    argv = ["--data", data, *LONG, *flags(use_mixed_precision=dtype, deepspeed=ROOT / "ds_configs" / f"{stage}.json")]
    call(score.main, "--data", data, *LONG, "--use_mixed_precision", dtype)
    said = run([ROOT / "train_dpo.py", *argv, "--output_dir", folder])
    return SimpleNamespace(folder=folder, argv=argv, said=said)


def weights(output_dir):
    return (output_dir / "final" / "model.safetensors").read_bytes()


def cut(whole, target, step):
    """A copy of the run as if stopped after `step`, with the lines that were logged since and a torn one."""
    shutil.copytree(whole.folder, target, ignore=shutil.ignore_patterns("final"))
    for path in (target / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    with open(target / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')


def test_resume_from_every_checkpoint(whole, tmp_path):
    """The same losses and the same weights, bit for bit, after a stop at any step; even after the last one."""
    assert [line["step"] for line in log(whole.folder)] == [1, 2, 3, 4, 5]
    assert len({line["learning_rate"] for line in log(whole.folder)}) > 3
    assert [path.name for path in sorted((whole.folder / "checkpoints").glob("*step*"))] == [
        f"step-{i}" for i in range(1, 6)
    ]
    jobs = []
    for step in range(1, 6):
        cut(whole, tmp_path / str(step), step)
        jobs.append((str(step), "train_dpo", [*whole.argv, "--output_dir", tmp_path / str(step)]))
    cut(whole, tmp_path / "chosen", 4)
    chosen = [
        "--output_dir",
        tmp_path / "chosen",
        "--resume_from_checkpoint",
        tmp_path / "chosen" / "checkpoints" / "step-2",
    ]
    jobs.append(("chosen", "train_dpo", [*whole.argv, *chosen]))
    did = run_jobs(tmp_path / "out", None, jobs)
    assert [rank[0]["error"] for rank in did.values()] == [""] * 6
    assert [len(rank[0]["items"]) for rank in did.values()] == [4, 3, 2, 1, 0, 3]  # it did go on from there
    for name in did:
        assert numbers(tmp_path / name) == numbers(whole.folder), name
        assert weights(tmp_path / name) == weights(whole.folder), name
        assert (tmp_path / name / "scores.jsonl").read_bytes() == (whole.folder / "scores.jsonl").read_bytes(), name


def test_killed_run(whole, tmp_path):
    """SIGKILL in the middle, and the same command again."""
    if whole.folder.name == "whole-zero0-bf16":
        pytest.skip("the other two are enough")
    command = [ROOT / "train_dpo.py", *whole.argv, "--output_dir", tmp_path / "run"]
    process = start(command)
    while not (tmp_path / "run" / "checkpoints" / "step-2").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "final").exists()
    assert "resuming after step" in run(command)
    assert numbers(tmp_path / "run") == numbers(whole.folder) and weights(tmp_path / "run") == weights(whole.folder)
    assert (tmp_path / "run" / "scores.jsonl").read_bytes() == (whole.folder / "scores.jsonl").read_bytes()


def test_finished_run(whole, capsys):
    """It is said, with exit code 0, and nothing is changed; another beta is refused by name."""
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()}
    argv = [*whole.argv, "--output_dir", whole.folder]
    assert call(train_dpo.main, *argv) == 0
    assert "this run is finished" in capsys.readouterr().out
    said = refusal(train_dpo.main, capsys, *argv, "--beta", 0.3)
    assert "beta = 0.05" in said and "0.3" in said
    assert call(train_dpo.main, *argv, "--logging_steps", 5, "--save_steps", 0) == 0  # these may differ
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()} == before


def test_unfinished_run_refuses_other_arguments(whole, tmp_path, capsys):
    cut(whole, tmp_path / "run", 3)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    for more, word in (
        (["--beta", 0.3], "beta = 0.05"),
        (["--seed", 1], "seed = 42"),
        (["--sft_weight", 0], "sft_weight = 0.1"),
    ):
        assert word in refusal(train_dpo.main, capsys, *whole.argv, "--output_dir", tmp_path / "run", *more)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("runs", [2], indirect=True)
def test_two_ranks_resume(runs, tmp_path, capsys):
    """ZeRO-3 on 2 ranks, stopped after step 2 of 3; on 1 rank as many pairs a step are asked for."""
    first, second, alone = runs.folder / "zero3-joint", tmp_path / "second", tmp_path / "alone"
    assert sorted(path.name for path in (first / "checkpoints").glob("*step*")) == [
        "step-2",
        "step-3",
    ]  # save_total_limit 2
    argv = ["--data", runs.data, *FP32, *RUN, "--deepspeed", runs.folder / "zero3.json"]
    argv += flags(tokens_per_forward=ALL, gradient_checkpointing=False, save_steps=1)
    cut(SimpleNamespace(folder=first), second, 2)
    cut(SimpleNamespace(folder=first), alone, 2)
    [did] = run_jobs(tmp_path / "out", 2, [("second", "train_dpo", [*argv, "--output_dir", second])]).values()
    assert [rank["error"] for rank in did] == [""] * 2 and [list(rank["items"]) for rank in did] == [["2"]] * 2
    assert numbers(second) == numbers(first) and weights(second) == weights(first)
    said = refusal(
        train_dpo.main, capsys, *argv, "--output_dir", alone
    )  # tests/faults/test_world.py goes on with what it asks for
    assert "another batch" in said and "--gradient_accumulation_steps 4" in said
