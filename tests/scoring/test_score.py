"""Tests of score.py: the score against the formula in plain.py, and the reference job's real command line.

    bash tests/run.sh tests/scoring/test_score.py

n response tokens, V vocabulary, T denoising steps, R trajectories, S states.
"""

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
from safetensors.torch import load_file, save_file
from small import (
    LENGTHS,
    MASK,
    ROOT,
    call,
    ds_config,
    flags,
    make_model,
    make_pairs,
    pack,
    refusal,
    run,
    run_jobs,
    start,
)

import score
import train_dpo
from files import InputError
from models import checkpoint, folders
from models.families import Masking
from scoring import noise, passes, reference
from scoring.states import response_states
from training import engine

SIZE = flags(diffusion_steps=4, trajectories=2)  # S = 7
NOISE = [*flags(estimator="spread"), *SIZE]
FP32 = flags(use_mixed_precision="no")


@pytest.fixture(scope="module")
def model_dir(tiny_dir, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("score") / "model", tiny_dir)


@pytest.fixture(scope="module")
def model(model_dir):
    return checkpoint.load_model(str(model_dir), torch.float32).eval()


@pytest.fixture(scope="module")
def weights(model_dir):
    return plain.load(model_dir)


def fake_model(table):
    """A model whose log p at flat position i of a row with m masks is table(m, i % L), unnormalised."""

    def forward(input_ids, positions, targets):
        rows, length = input_ids.shape
        logits = [table(int((input_ids[i // length] == MASK).sum()), i % length) for i in positions.tolist()]
        return torch.tensor(logits).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    return forward


def scored(model, prompt, response, reveal, T, tokens_per_forward=4096, estimator="stepwise"):
    """diffusion_score of `reveal` (R, n)."""
    masked = noise.trajectory_masks(np.array(reveal), T)
    weight = noise.state_weights(masked, estimator, T, len(reveal))
    with torch.no_grad():
        return score.diffusion_score(
            model, np.array(prompt), np.array(response), masked, weight, Masking(MASK), tokens_per_forward
        )


# The score


def test_uniform_logits():
    response = [4, 5, 6, 0, 1]
    reveal = noise.trajectories(5, 4, 3, noise.generator(0, response, "chosen"))
    got = scored(fake_model(lambda masks, i: [0.5] * 7), [2, 2], response, reveal, 4)
    assert float(got.sum()) == pytest.approx(-5 * math.log(7), abs=1e-5)


def test_by_hand():
    """V = 4, prompt [0], response [1, 2, 1], T = 2; the probabilities tell the states and the positions apart.

    Trajectory 0 reveals tokens 0 and 2, then 1; trajectory 1 reveals 1, then 0 and 2:
    S = 1/2 (log 1/2 + log 1/8 + log 1/10 + log 1/4 + log 1/5 + log 1/16)
    """

    def table(masks, i):
        p = {
            (3, 1): [0.1, 1 / 2, 0.2, 0.2],
            (3, 2): [0.2, 0.3, 1 / 4, 0.25],
            (3, 3): [0.2, 1 / 8, 0.5, 0.175],
            (1, 2): [0.5, 0.2, 1 / 10, 0.2],
            (2, 1): [0.4, 1 / 5, 0.2, 0.2],
            (2, 3): [0.3, 1 / 16, 0.6, 0.0375],
        }[masks, i]
        return [math.log(value) + 3 for value in p]

    got = scored(fake_model(table), [0], [1, 2, 1], [[0, 1, 0], [1, 0, 1]], 2)
    want = [math.log(1 / 2 * 1 / 8 * 1 / 4) / 2, math.log(1 / 10) / 2, math.log(1 / 5 * 1 / 16) / 2]  # by state
    assert got.tolist() == pytest.approx(want, abs=1e-6)
    assert float(got.sum()) == pytest.approx(-math.log(51200) / 2, abs=1e-6)
    got = scored(fake_model(table), [0], [1, 2, 1], [[0, 1, 0], [1, 0, 1]], 2, estimator="spread")
    # state 0 has (2 + 1) / 3 of each token; the others reveal all that they hide
    want = [math.log(1 / 2 * 1 / 4 * 1 / 8) / 2, math.log(1 / 10) / 2, math.log(1 / 5 * 1 / 16) / 2]
    assert got.tolist() == pytest.approx(want, abs=1e-6)


# More denoising steps than tokens, one token, 200 tokens, one step, one trajectory
@pytest.mark.parametrize("estimator", ["stepwise", "spread"])
@pytest.mark.parametrize("n, T, R", [(7, 4, 5), (1, 4, 3), (3, 8, 2), (200, 4, 2), (6, 1, 2), (12, 12, 1)])
def test_naive_formula(model, weights, n, T, R, estimator):
    rng = np.random.default_rng(n)
    prompt, response = rng.integers(4, 512, 5), rng.integers(4, 512, n)
    reveal = rng.integers(0, T, (R, n))  # any assignment: some steps reveal nothing, step sizes differ
    want = plain.score(weights, prompt, response, reveal.tolist(), T, estimator == "spread").item()
    for tokens in (1, 3 * (5 + n), 4 * (5 + n) + 1, 4096):
        got = float(scored(model, prompt, response, reveal, T, tokens, estimator).sum())
        assert got == pytest.approx(want, rel=1e-5), tokens


def test_bf16_tokens_per_forward(model_dir):
    model = checkpoint.load_model(str(model_dir), torch.bfloat16)
    rng = np.random.default_rng(0)
    prompt, response, reveal = rng.integers(4, 512, 9), rng.integers(4, 512, 40), rng.integers(0, 4, (5, 40))
    got = [float(scored(model, prompt, response, reveal, 4, tokens).sum()) for tokens in (1, 150, 200, 4096)]
    assert got == pytest.approx([got[0]] * 4, rel=1e-3)


def test_differentiable(model, weights):
    """The gradient of the score is autograd's of the formula."""
    prompt, response, reveal = [5, 6], [7, 8, 9], [[0, 1, 1], [1, 0, 1]]
    masked = noise.trajectory_masks(np.array(reveal), 2)
    got = score.diffusion_score(
        model, np.array(prompt), np.array(response), masked, noise.trajectory_weights(masked, 2, 2), Masking(MASK), 2
    ).sum()
    names, parameters = zip(*model.named_parameters())
    want = torch.autograd.grad(
        plain.score(weights, prompt, response, reveal, 2, spread=False), [weights[name] for name in names]
    )
    for ours, theirs in zip(torch.autograd.grad(got, parameters), want):
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))


def test_only_response_tokens_are_masked():
    """Also where the prompt or the response holds the mask token itself."""
    prompt, response = np.array([9, MASK, 11]), np.array([8, 7, MASK, 6])
    reveal = np.array([[0, 1, 2, 2], [2, 0, 1, 0]])
    masked = noise.trajectory_masks(reveal, 3)
    states = response_states(prompt, response, masked, noise.trajectory_weights(masked, 3, 2), MASK)
    assert states.inputs.tolist() == [
        [9, 3, 11] + row for row in ([3, 3, 3, 3], [8, 3, 3, 3], [8, 7, 3, 3], [3, 7, 3, 6], [3, 7, 3, 6])
    ]
    assert (states.targets == [9, 3, 11, 8, 7, 3, 6]).all()
    assert not states.weight[:, :3].any() and states.weight.sum(0).tolist() == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("n", [1, 2, 50])
def test_states_that_reveal_nothing_need_no_forward_pass(n):
    """With one state a pass: as many passes as states with weight, in every estimator that has states without."""
    T, R = 6, 3
    masked = noise.state_masks(n, "spread", T, R, noise.generator(0, [n], "chosen"))
    weight = noise.state_weights(masked, "spread", T, R)
    states, ran = response_states(np.array([5]), np.arange(4, 4 + n), masked, weight, MASK), []

    def model(input_ids, positions, targets):
        ran.append(input_ids.tolist())
        return -torch.ones(len(targets))

    [got] = score.state_scores(model, [states], 1, engine.Ranks(0, 1, torch.device("cpu")))
    live = [row for row in range(16) if weight[row].any()]
    assert ran == [[states.inputs[row].tolist()] for row in live] and (n > 1 or len(live) < 16)
    assert got.tolist() == pytest.approx((-weight.sum(1)).tolist(), abs=1e-5) and got.sum() == pytest.approx(-n)


# The reference job


@pytest.fixture(scope="module")
def jobs(model_dir, tmp_path_factory):
    """The job on 1 and on 2 ranks: 19 pairs in chunks of 8, plain and streamed by ZeRO-3 offload, fp32 and bf16."""
    folder, done = tmp_path_factory.mktemp("jobs"), {}
    stream = ["--deepspeed", ds_config(folder / "stream.json", "zero3_offload_4080")]
    for world in (1, 2):
        pairs, rows = make_pairs(LENGTHS), []
        pack(folder / f"plain-{world}", pairs, model_dir)
        pack(folder / f"stream-{world}", pairs, model_dir)
        for name, data, more in (
            ("plain", "plain", FP32),
            ("bf16", "plain", flags(use_mixed_precision="bf16")),
            ("stream", "stream", FP32 + stream),
        ):
            argv = ["--data", folder / f"{data}-{world}", *NOISE, *flags(tokens_per_forward=40 * world), *more]
            rows.append((name, "score", argv))
        done[world] = run_jobs(folder / f"out-{world}", world, rows)
        for name, ranks in done[world].items():
            assert [rank["error"] for rank in ranks] == [""] * world, (name, ranks)
    return folder, done


def read_reference(packed, dtype="no"):
    [sets], [scores] = plain.read_reference(packed, dtype=dtype)
    return sets, scores


def test_reference_is_the_formula(jobs, weights):
    folder, _ = jobs
    pairs, (reveal, scores) = plain.read_packed(folder / "plain-1"), read_reference(folder / "plain-1")
    assert scores.shape == (19, 2, 7) and scores.dtype == np.float32
    for (prompt, *sides), masks, got in zip(pairs, reveal, scores):
        for side, steps, parts in zip(sides, masks, got):
            assert float(parts.sum()) == pytest.approx(plain.score(weights, prompt, side, steps, 4).item(), rel=1e-5)
            for trajectory in steps:  # each step reveals its share, give or take one
                sizes = [trajectory.count(s) for s in range(4)]
                assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("data, dtype", [("plain", "no"), ("plain", "bf16"), ("stream", "no")])
def test_world_size(jobs, data, dtype):
    """1 and 2 ranks, and 40 and 80 tokens a forward: equal noise and scores; streamed = plain."""
    folder, done = jobs
    (noise, scores), (same_noise, same), (_, wanted) = (
        read_reference(folder / name, dtype) for name in (f"{data}-1", f"{data}-2", "plain-1")
    )
    assert noise == same_noise
    np.testing.assert_allclose(same.sum(-1), scores.sum(-1), rtol=1e-5 if dtype == "no" else 1e-3)
    np.testing.assert_allclose(scores.sum(-1), wanted.sum(-1), rtol=1e-5)
    for name in ("plain", "bf16", "stream"):
        first, second = done[2][name]
        assert first["forwards_without_graph"] == second["forwards_without_graph"] > 0  # ZeRO-3 would hang
        assert first["forwards"] == second["forwards"] == 0
        assert done[1][name][0]["forwards_without_graph"] == planned(folder / f"{data}-1", 40), name


def planned(folder, tokens):
    """Forward passes of the reference job on one rank: a chunk's rows that reveal something fill passes together."""
    pairs, (reveal, _) = plain.read_packed(folder), read_reference(folder)
    rows = []
    for (prompt, *sides), both in zip(pairs, reveal):
        live = [int(any(0 in steps for steps in each)) + sum(len({*steps} - {0}) for steps in each) for each in both]
        rows.append([len(prompt) + len(side) for side, count in zip(sides, live) for _ in range(count)])
    return sum(len(passes.fill(sum(rows[first : first + 8], []), tokens)) for first in range(0, len(rows), 8))


def test_meta(jobs, model_dir):
    folder, _ = jobs
    found = [json.loads(path.read_text()) for path in (folder / "plain-2").glob("ref-*/meta.json")]
    metas = {meta["depends_on"]["dtype"]: meta for meta in found}
    data = json.loads((folder / "plain-2" / "meta.json").read_text())
    assert metas["no"]["depends_on"] == {
        "data": data["fingerprint"],
        "tokenizer": data["tokenizer"],
        "model": folders.model_fingerprint(str(model_dir)),
        "block_size": 0,
        "estimator": "spread",
        "order": "random",
        "block_length": None,
        "diffusion_steps": 4,
        "trajectories": 2,
        "noise_seed": 0,
        "drawing": noise.drawing("spread", False),
        "mask_token_id": 3,
        "shift_logits": False,
        "dtype": "no",
        "load_in_4bit": False,
    }
    assert metas["bf16"]["noise_sets"] == 1 and metas["bf16"]["states"] == 7 and metas["bf16"]["ranks"] == 2
    assert metas["bf16"]["tokens_per_forward"] == 80
    assert not list((folder / "plain-2").glob("ref-*/chunks*"))


def test_neighbours(jobs, model_dir, tmp_path):
    """Pairs in another file, in another order, have the same noise bit for bit and the same scores."""
    folder, _ = jobs
    order = [4, 0, 18, 7, 1]
    pairs = make_pairs(LENGTHS)
    pack(tmp_path / "packed", [pairs[i] for i in order], model_dir)
    assert call(score.main, "--data", tmp_path / "packed", *NOISE, *FP32, "--tokens_per_forward", 4096) == 0
    (noise, scores), (whole_noise, whole) = read_reference(tmp_path / "packed"), read_reference(folder / "plain-1")
    assert noise == [whole_noise[i] for i in order]
    np.testing.assert_allclose(scores.sum(-1), whole[order].sum(-1), rtol=1e-5)


def test_noise_differs(model_dir, tmp_path):
    """Between noise sets, pairs and seeds; not between equal sides of a pair, nor with --seed or the data type."""
    prompt, side = [5, 6, 7], list(range(10, 60))
    pack(tmp_path, [(prompt, side, side), (prompt[1:], side, side)], model_dir)
    for more in (["--noise_sets", 2], ["--noise_seed", 1], ["--seed", 7, "--use_mixed_precision", "bf16"]):
        assert call(score.main, "--data", tmp_path, *NOISE, *FP32, *more) == 0
    sets, _ = plain.read_reference(tmp_path, noise_seed=0, dtype="no")
    seeded, _ = plain.read_reference(tmp_path, noise_seed=1)
    assert all(chosen == rejected for k in (*sets, *seeded) for chosen, rejected in k)
    draws = [json.dumps(chosen) for k in (*sets, *seeded) for chosen, _ in k]
    assert len(set(draws)) == len(draws) == 6
    assert plain.read_reference(tmp_path, dtype="bf16")[0] == sets[:1]


def test_blocks(model_dir, tmp_path):
    """Order blocks: the reference job's masks fill block after block; random-order scores are refused for it."""
    packed = pack(tmp_path, make_pairs(LENGTHS[:7]), model_dir)
    call(score.main, "--data", packed, *NOISE, *FP32)
    blocks = ["--order", "blocks", "--block_length", 5]
    with pytest.raises(
        InputError, match="order is random there and blocks in this run.*--order blocks --block_length 5"
    ):
        train_dpo.prepare(train_dpo.read_arguments(list(map(str, ["--data", packed, *SIZE, *FP32, *blocks]))))
    call(score.main, "--data", packed, *SIZE, *FP32, *blocks)
    sets, scores = plain.read_reference(packed, order="blocks")
    assert np.isfinite(scores[0]).all()
    for response in (side for pair in sets[0] for side in pair):
        for steps in response:  # of one trajectory
            cut = [steps[first : first + 5] for first in range(0, len(steps), 5)]
            assert all(max(left) <= min(right) for left, right in zip(cut, cut[1:]))
    train_dpo.prepare(train_dpo.read_arguments(list(map(str, ["--data", packed, *SIZE, *FP32, *blocks]))))


def files(packed):
    return {path.relative_to(packed): path.read_bytes() for path in packed.glob("ref-*/*.npy")}


def test_killed_job(model_dir, tmp_path, monkeypatch):
    """SIGKILL once a chunk is there; a torn chunk; the same command again: the same bytes as a job that was let be."""
    pairs = make_pairs(LENGTHS * 4)
    whole, killed = pack(tmp_path / "whole", pairs, model_dir), pack(tmp_path / "killed", pairs, model_dir)
    assert call(score.main, "--data", whole, *NOISE, *FP32) == 0
    command = [ROOT / "score.py", "--data", killed, *NOISE, *FP32]
    process = start(command)
    while len(chunks := list(killed.glob("ref-*/chunks-0/*.npz"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not files(killed) and not list(killed.glob("ref-*/meta.json"))
    chunks = sorted(killed.glob("ref-*/chunks-0/*.npz"))
    assert 3 <= len(chunks) < 10
    os.truncate(chunks[0], 0)
    os.truncate(chunks[1], chunks[1].stat().st_size // 2)
    kept = {path: path.stat().st_mtime_ns for path in chunks[2:]}
    with pytest.raises(InputError, match="holds no reference"):  # chunks are none
        train_dpo.prepare(train_dpo.read_arguments(["--data", str(killed), *NOISE, *FP32]))

    def remove(path):
        assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a whole chunk was made again"
        removed.append(shutil.rmtree(path))

    removed = []
    monkeypatch.setattr(reference, "shutil", SimpleNamespace(rmtree=remove))
    assert call(score.main, *command[1:]) == 0 and removed
    assert files(killed) == files(whole) and len(files(whole)) == 2


def test_more_noise_sets(model_dir, tmp_path, capsys):
    """A set is added without touching the first; what is up to date says so."""
    pack(tmp_path, make_pairs(LENGTHS[:3]), model_dir)
    argv = ["--data", tmp_path, *NOISE, *FP32]
    call(score.main, *argv)
    before = files(tmp_path)
    given = " ".join(map(str, argv))
    assert capsys.readouterr().out.splitlines()[-1] == f"next: python train_dpo.py {given}"
    call(score.main, *argv)
    assert "up to date" in capsys.readouterr().out and files(tmp_path) == before
    call(score.main, *argv, "--noise_sets", 3)
    after = files(tmp_path)
    assert len(before) == 2 and len(after) == 6 and before.items() <= after.items()
    call(score.main, *argv, "--noise_sets", 2)
    assert "up to date" in capsys.readouterr().out and files(tmp_path) == after
    fresh = pack(tmp_path / "fresh", make_pairs(LENGTHS[:3]), model_dir)
    call(score.main, "--data", fresh, *NOISE, *FP32, "--noise_sets", 3)
    assert files(fresh) == after


def test_broken_model(model_dir, tmp_path, capsys):
    """One NaN, in a token of pair 1 alone: the job names the pair, and leaves nothing that could be replayed."""
    pairs = [([5, 6], [7, 8], [9, 10]), ([5, 6], [7, 99], [9, 10])]
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.transformer.wte.weight"][99] = math.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    packed = pack(tmp_path / "packed", pairs, broken)
    said = refusal(score.main, capsys, "--data", packed, *NOISE, *FP32)
    assert "pair 1 " in said and "finite" in said and not files(packed)
    again = run([ROOT / "score.py", "--data", packed, *NOISE, *FP32], code=2)
    assert "Traceback" not in again and said in again


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--diffusion_steps", 0], "--diffusion_steps is 0"),
        (["--trajectories", 0], "--trajectories is 0"),
        (["--estimator", "stepwise", "--diffusion_steps", "auto"], "does not measure --estimator stepwise"),
        (["--noise_sets", 0], "--noise_sets is 0"),
        (["--block_length", 0], "--block_length is 0"),
        (["--tokens_per_forward", 0], "--tokens_per_forward is 0"),
        (["--model_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
        (["--data", "nowhere"], "data_prep.py"),
        (["--deepspeed", "nowhere.json"], "nowhere.json"),
    ],
)
def test_refusals(model_dir, tmp_path, capsys, argv, words):
    pack(tmp_path, make_pairs(LENGTHS[:1]), model_dir)
    assert words in refusal(score.main, capsys, "--data", tmp_path, *argv)


def test_another_tokenizer(model_dir, tmp_path, capsys):
    """Arrays packed with another tokenizer are refused, with the command that packs them anew."""
    packed = pack(tmp_path / "packed", make_pairs(LENGTHS[:1]), model_dir)
    other = shutil.copytree(model_dir, tmp_path / "other")
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages }}"}))
    said = refusal(score.main, capsys, "--data", packed, "--model_name_or_path", other)
    assert (
        "tokenizer" in said
        and f"python data_prep.py --in prefs.jsonl --out {packed} --model_name_or_path {other}" in said
    )
