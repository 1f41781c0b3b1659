"""Tests of what train_dpo.py refuses before a run, and of training/memory.py.

bash tests/run.sh tests/training/test_train_refusals.py
"""

import json
import os
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import LENGTHS, ROOT, call, flags, make_model, make_pairs, pack, refusal, run

import config
import files
import score
import train_dpo
from scoring.states import sizes
from training import deepspeed_config, memory

FP32 = flags(diffusion_steps=3, trajectories=2, use_mixed_precision="no")


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    return SimpleNamespace(folder=folder, model=make_model(folder / "model", tiny_dir))


# --- refusals: one sentence, exit code 2 ------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(home):
    """Packed pairs with reference scores in float32, made here."""
    data = pack(home.folder / "scored", make_pairs(LENGTHS[:6]), home.model)
    assert call(score.main, "--data", data, *FP32) == 0
    return data


def mended(sentence, *argv):
    """Run the command that a refusal names; then the arguments are accepted."""
    words = shlex.split(sentence.split("run: ")[1])
    assert words[:2] == ["python", "score.py"]
    assert call(score.main, *words[2:]) == 0
    train_dpo.prepare(train_dpo.read_arguments(list(map(str, argv))))


def test_wrong_reference(home, scored, tmp_path, capsys):
    """Missing, of another model, other T, R, seed, dtype or fewer sets: what differs, and the command that mends it."""

    def refused(data, *argv):
        said = refusal(train_dpo.main, capsys, "--data", data, *argv, "--output_dir", tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return said

    bare = pack(tmp_path / "bare", make_pairs(LENGTHS[:3]), home.model)
    argv = [*flags(diffusion_steps=2, trajectories=3, noise_seed=5, noise_sets=2, use_mixed_precision="no")]
    said = refused(bare, *argv)
    assert "holds no reference scores" in said
    mended(said, "--data", bare, *argv)
    for more, word in (
        (["--diffusion_steps", 4], "diffusion_steps is 2 there and 4 in this run"),
        (["--trajectories", 2], "trajectories is 3 there and 2"),
        (["--noise_seed", 0], "noise_seed is 5 there and 0"),
        (["--noise_sets", 3], "--noise_sets 3"),
        (["--use_mixed_precision", "bf16"], "dtype is no there and bf16"),
    ):
        said = refused(bare, *argv, *more)
        assert word in said
        mended(said, "--data", bare, *argv, *more)
    other = make_model(tmp_path / "other", home.model, seed=1)
    said = refused(scored, *FP32, "--model_name_or_path", other)
    assert "model is " in said and str(other) in said
    mended(said, "--data", scored, *FP32, "--model_name_or_path", other)


def test_edited_scores(home, scored, tmp_path, capsys):
    """Scores that the policy does not reproduce: refused before the first step, by every rank alike."""
    data = shutil.copytree(scored, tmp_path / "packed")
    [path] = [
        meta.parent / "ref_scores-0.npy"
        for meta in data.glob("ref-*/meta.json")
        if json.loads(meta.read_text())["depends_on"]["dtype"] == "no"
        and json.loads(meta.read_text())["model_name_or_path"] == str(home.model)
    ]
    scores = np.load(path)
    scores[:, 1, 0] += 1.0
    np.save(path, scores)
    said = refusal(train_dpo.main, capsys, "--data", data, *FP32, "--output_dir", tmp_path / "run")
    assert "ref_scores-0.npy: is not as it was written" in said and "python score.py" in said
    meta = json.loads((path.parent / "meta.json").read_text())
    meta["files"][path.name] = files.file_sha256(path)
    (path.parent / "meta.json").write_text(json.dumps(files.sealed(meta)))
    argv = [ROOT / "train_dpo.py", "--data", data, *FP32, "--output_dir", tmp_path / "run"]
    said = run(argv, code=2)
    assert "Traceback" not in said and "differ from the policy's by" in said and "python score.py" in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--beta", 0], "--beta is 0"),
        (["--learning_rate", -1], "--learning_rate is -1"),
        (["--eval_fraction", 1], "--eval_fraction"),
        (["--label_smoothing", 0.5], "--label_smoothing"),
        (["--label_smoothing", 0.1, "--loss_type", "ipo"], "not ipo"),
        (["--gradient_accumulation_steps", 0], "--gradient_accumulation_steps is 0"),
        (["--beta", "nan"], "--beta is nan"),
        (["--learning_rate", "nan"], "--learning_rate is nan"),
        (["--sft_weight", -1], "--sft_weight is -1"),
        (["--sft_pad_to", -5], "--sft_pad_to is -5"),
        (["--max_grad_norm", -1], "--max_grad_norm is -1"),
        (["--warmup_ratio", 2], "--warmup_ratio is 2"),
        (["--adam_beta1", 1.5], "--adam_beta1 is 1.5"),
        (["--max_steps", 0, "--num_train_epochs", 0], "expected one of them more than 0"),
        (["--num_train_epochs", "nan"], "expected one"),
        (["--sft_weight", 1, "--loss_type", "sft"], "leave it out with --loss_type sft"),
        (["--backprop_steps", 6], "expected at most the 5 states"),
        (["--backprop_steps", -1], "--backprop_steps is -1"),
        (["--states_per_forward", "many"], "many is neither a number nor auto"),
        (["--states_per_forward", 0], "--states_per_forward is 0"),
        (["--eval_fraction", 0.99], "leaves no pair to train on"),
        (["--resume_from_checkpoint", "latest"], "holds no checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "not a checkpoint"),
        (["--deepspeed", "nowhere.json"], "nowhere.json"),
    ],
)
def test_refusals(scored, tmp_path, capsys, argv, words):
    assert words in refusal(train_dpo.main, capsys, "--data", scored, *FP32, "--output_dir", tmp_path / "run", *argv)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gradient_clipping": 2.0}, "max_grad_norm"),
        ({"bf16": {"enabled": True}}, "use_mixed_precision"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps"),
        ({"sparse": "auto"}, '"sparse"'),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"zero_optimization": {"stage": 5}}, "stage is 5"),
        ({"optimizer": {"type": "Adafactor"}}, "without the rows and columns"),
    ],
)
def test_one_home_for_a_value(scored, tmp_path, capsys, change, words):
    """A literal of the ds_config that contradicts the run is refused, and names both."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json.loads((ROOT / "ds_configs" / "zero0.json").read_text()) | change))
    said = refusal(
        train_dpo.main, capsys, "--data", scored, *FP32, "--output_dir", tmp_path / "run", "--deepspeed", path
    )
    assert words in said and str(path) in said


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_ds_configs(path):
    """Every shipped file resolves; to DeepSpeed each backward pass is an accumulation step."""
    args = config.TrainArguments(learning_rate=0.25, max_grad_norm=0.5)
    made = deepspeed_config.training_config(
        deepspeed_config.read_ds_config(path), args, config.ModelArguments(), 6, path
    )
    assert made["gradient_accumulation_steps"] == 6 and made["optimizer"]["params"]["lr"] == 0.25
    assert (
        made["gradient_clipping"] == 0.5 and made["bf16"]["enabled"] and not list(deepspeed_config.places_of_auto(made))
    )


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "free, other_rank_fits, want",
    [(1000, True, 16), (199, True, 8), (99, True, 4), (11, True, 1), (5, True, 1), (1000, False, 1)],
)
def test_largest_that_fits(monkeypatch, free, other_rank_fits, want):
    """A size is tried if twice what the last one took fits 0.8 of what is free, on every rank; 10 bytes a row here."""
    tried, held = [], 2**20

    def usage(_):
        return SimpleNamespace(ru_maxrss=(held + 10 * tried[-1]) / 2**10)

    def gather(fits):
        return [fits, other_rank_fits]

    monkeypatch.setattr(memory, "memory_now", lambda device: (held, free))
    monkeypatch.setattr(memory.resource, "getrusage", usage)
    ranks = SimpleNamespace(device=torch.device("cpu"), gather=gather)
    found = memory.largest_that_fits({size: size for size in sizes(16)}, tried.append, ranks)
    assert found.size == want == tried[-1] and found.peak_gib == pytest.approx((held + 10 * want) / 2**30)
    assert tried == [1, 2, 4, 8, 16][: len(tried)]


def test_memory_is_predicted_by_rows_and_kept_for_later(monkeypatch):
    """The last size may hold twice as many rows (two responses in one graph); `reserved` is left free."""
    tried = []
    monkeypatch.setattr(memory, "memory_now", lambda device: (0, 100))
    monkeypatch.setattr(memory, "peak_of", lambda trial, size, device: trial(size) or 10 * size)
    ranks = SimpleNamespace(device=torch.device("cpu"), gather=lambda fits: [fits])
    assert memory.largest_that_fits({1: 1, 2: 2, 4: 8}, tried.append, ranks).size == 2
    assert memory.largest_that_fits({1: 1, 2: 2, 4: 4}, tried.append, ranks, reserved=76).size == 1
    assert tried == [1, 2, 1]


def test_memory_now():
    """What is held grows by what is taken; what is free is within the machine."""
    held, free = memory.memory_now(torch.device("cpu"))
    block = np.ones(2**25)  # 256 MiB
    assert memory.memory_now(torch.device("cpu"))[0] - held == pytest.approx(block.nbytes, rel=0.1)
    assert 0 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
