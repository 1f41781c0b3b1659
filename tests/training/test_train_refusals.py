"""Tests of what train_dpo.py refuses before a run.

bash tests/run.sh tests/training/test_train_refusals.py
"""

import json
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from small import LENGTHS, ROOT, call, flags, last_of_each, make_model, make_pairs, pack, refusal, run

import config
import files
import score
import train_dpo
from training import deepspeed_config

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
    train_dpo.prepare(train_dpo.read_arguments(last_of_each(argv)))


def test_wrong_reference(home, scored, tmp_path, capsys):
    """Missing, of another model, other T, R, seed, dtype or fewer sets: what differs, and the command that mends it."""

    def refused(data, *argv):
        said = refusal(train_dpo.main, capsys, "--data", data, *argv, "--output_dir", tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return said

    bare = pack(tmp_path / "bare pairs", make_pairs(LENGTHS[:3]), home.model)
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
        (["--tokens_per_forward", "many"], "many is neither a number nor auto"),
        (["--tokens_per_forward", 0], "--tokens_per_forward is 0"),
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
    """Every shipped file resolves; DeepSpeed is not told how many backward passes a step has."""
    args = config.TrainArguments(learning_rate=0.25, max_grad_norm=0.5)
    read = deepspeed_config.read_ds_config(path)
    made = deepspeed_config.training_config(read, args, config.ModelArguments(), path)
    assert made["gradient_accumulation_steps"] == 1 and made["optimizer"]["params"]["lr"] == 0.25
    assert made["gradient_clipping"] == 0.5 and made["bf16"]["enabled"] and "auto" not in json.dumps(made)
