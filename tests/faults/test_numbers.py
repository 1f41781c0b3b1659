"""Tests of numbers that are wrong: steps without a finite gradient, in every ZeRO stage; evaluations; checkpoints.

bash tests/run.sh tests/faults/test_numbers.py
"""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small import LENGTHS, call, ds_config, flags, log, make_home, run_jobs

import files
import score
from training import guard, runs

RUN = flags(
    diffusion_steps=2,
    trajectories=2,
    learning_rate=3e-3,
    gradient_accumulation_steps=2,
    max_steps=5,
    eval_fraction=0.1,
    tokens_per_forward=100,
    save_steps=2,
    save_total_limit=0,
    num_train_epochs=9,
)
STAGES = ("zero0", "zero2", "zero2_offload_4080", "zero3_offload_4080")
BAD = 3  # the step (1-based) whose loss is not a number


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("numbers"), tiny_dir, LENGTHS[:12], 3)


@pytest.fixture(scope="module", params=["no", "bf16"])
def skipped(request, home):
    """Five steps in every stage; the loss of one pair of the third step is NaN (worker.py's POISON)."""
    folder = home.folder / request.param
    folder.mkdir()
    base = ["--data", home.data, *RUN, "--use_mixed_precision", request.param]
    jobs = [("score", "score", base)]
    for stage in STAGES:
        path = ds_config(folder / f"{stage}.json", stage, eps=1e-3)
        jobs.append((stage, "train_dpo", [*base, "--deepspeed", path, "--output_dir", folder / stage]))
    os.environ["POISON"] = str(BAD - 1)
    try:
        did = run_jobs(folder / "out", None, jobs)
    finally:
        del os.environ["POISON"]
    assert {name: ranks[0]["error"] for name, ranks in did.items()} == dict.fromkeys(did, "")
    return SimpleNamespace(folder=folder, dtype=request.param)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_skipped(skipped, stage):
    """No weight changes, the pair is named with its line, and the run continues with finite numbers."""
    lines = log(skipped.folder / stage)
    assert [line["skipped"] for line in lines] == [step == BAD for step in range(1, 6)]
    before, after, later = (
        torch.load(skipped.folder / "out" / f"{stage}.step-{step}.pt") for step in (BAD - 1, BAD, BAD + 1)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(later[name], after[name]) for name in before)
    assert lines[BAD - 1]["loss"] is None and lines[BAD - 1]["grad_norm"] is None
    for line in lines:
        assert line["skipped"] or math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
    [line] = (skipped.folder / stage / "skipped.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["step"] == BAD and entry["line"] == entry["pair"] + 1
    assert entry["source"] == "prefs.jsonl" and entry["loss"] is None


def test_stages_agree_after_a_skip(skipped):
    """The optimizer's state is as if there had been no such step: every stage continues alike."""
    first = load_file(skipped.folder / STAGES[0] / "final" / "model.safetensors")
    for stage in STAGES[1:]:
        other = load_file(skipped.folder / stage / "final" / "model.safetensors")
        close = 1e-5 if skipped.dtype == "no" else 2e-2
        assert all(torch.allclose(first[name].float(), other[name].float(), atol=close) for name in first), stage


def test_resume_after_a_skip(skipped, home):
    """Adam has made one step less than the run; so it has in a resumed run, to the last bit."""
    folder, stage = skipped.folder, "zero3_offload_4080"
    again = folder / "again"
    shutil.copytree(folder / stage, again, ignore=shutil.ignore_patterns("final"))
    assert sorted(path.name for path in (again / "checkpoints").glob("step-*")) == ["step-2", "step-4"]
    argv = ["--data", home.data, *RUN, "--use_mixed_precision", skipped.dtype]
    argv += ["--deepspeed", folder / f"{stage}.json", "--output_dir", again]
    [[did]] = run_jobs(folder / "out-again", None, [("again", "train_dpo", argv)]).values()
    assert not did["error"] and list(did["items"]) == ["4"]
    weights = [each / "final" / "model.safetensors" for each in (again, folder / stage)]
    assert files.file_sha256(weights[0]) == files.file_sha256(weights[1])


def test_a_run_that_keeps_failing_stops(home, tmp_path):
    """Three steps in a row: one sentence, the evidence on disk, and the weights as they were."""
    base = ["--data", home.data, *RUN, "--use_mixed_precision", "no"]
    os.environ["POISON"] = "2,3,4"
    try:
        jobs = [("score", "score", base), ("run", "train_dpo", [*base, "--output_dir", tmp_path / "run"])]
        did = run_jobs(tmp_path / "out", None, jobs)
    finally:
        del os.environ["POISON"]
    [rank] = did["run"]
    assert "3 in a row" in rank["error"] and "skipped.jsonl" in rank["error"]
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "run" / "final").exists()


def test_infinite_loss_with_a_finite_gradient_is_poisoned():
    """An infinite loss may have a finite gradient: times poison it is NaN; that of a finite loss is unchanged."""
    for loss, ok in ((2.5, True), (math.inf, False), (-math.inf, False), (math.nan, False)):
        x = torch.tensor(loss, requires_grad=True)
        (x * guard.poison(x)).backward()
        assert bool(torch.isfinite(x.grad)) == ok and (not ok or float(x.grad) == 1)


def evaluation(accuracy, low, high, chosen):
    return {
        "eval_rewards/accuracies": accuracy,
        "eval_rewards/accuracies_ci95": [low, high],
        "eval_rewards/chosen": chosen,
    }


def test_warnings_about_an_evaluation():
    good = evaluation(0.8, 0.7, 0.9, 0.5)
    assert guard.falling(good, {}, 50, 0.1) == [] == guard.falling(good, good, 50, 0.1)
    [said] = guard.falling(evaluation(0.5, 0.4, 0.6, 0.5), good, 50, 0.1)
    assert "accuracy is 0.500, it was 0.800" in said
    [said] = guard.falling(evaluation(0.2, 0.1, 0.3, 0.5), {}, 50, 0.1)
    assert "below chance" in said
    [said] = guard.falling(evaluation(0.8, 0.7, 0.9, -3.0), good, 50, 0.1)  # -30 nats over 50 tokens
    assert "0.60 nats per token less likely" in said
    assert guard.falling({"eval_loss": 1.0}, {}, 1, 0.1) == []


def test_a_checkpoint_whose_probe_does_not_match(home, tmp_path):
    """Its weights are not those that were saved: refused before a step is made."""
    base = ["--data", home.data, *RUN, "--use_mixed_precision", "no", "--output_dir", tmp_path / "run"]
    call(score.main, *base[:-2])
    did = run_jobs(tmp_path / "out", None, [("run", "train_dpo", [*base, "--max_steps", 2])])
    assert not did["run"][0]["error"]
    shutil.rmtree(tmp_path / "run" / "final")
    path = tmp_path / "run" / "checkpoints" / "step-2" / "state.json"
    state = json.loads(path.read_text())
    chosen, rejected = state["probe"]
    path.write_text(json.dumps(files.sealed(state | {"probe": [chosen + 1.0, rejected]})))
    assert runs.torn(path.parent) == ""
    did = run_jobs(tmp_path / "out2", None, [("run", "train_dpo", [*base, "--max_steps", 2])])
    assert "longest pair's scores differ by" in did["run"][0]["error"]
    path.write_text(json.dumps(files.sealed(state)))
    did = run_jobs(tmp_path / "out3", None, [("run", "train_dpo", [*base, "--max_steps", 2])])
    assert not did["run"][0]["error"] and (tmp_path / "run" / "final").exists()
