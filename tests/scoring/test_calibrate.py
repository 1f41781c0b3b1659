"""Tests of calibrate.py: what it measures on noise whose numbers are known, what it recommends, and the command itself.

bash tests/run.sh tests/scoring/test_calibrate.py
"""

import json
from types import SimpleNamespace

import new_tiny
import numpy as np
import pytest
from prepared import write_rows
from small import LENGTHS, call, flags, make_model, make_pairs, pack, refusal, run_jobs

import calibrate
import config
import data_prep
import score
import train_dpo
from preferences import packed
from reasoning import tasks
from scoring import calibration

FEW = [("spread", 2, 2), ("spread", 3, 2), ("stepwise", 4, 1), ("elbo", 4, 1), ("elbo_stratified", 4, 1)]
FP32 = flags(use_mixed_precision="no")
AUTO = flags(diffusion_steps="auto", use_mixed_precision="no")
SMALL = flags(pairs=3, draws=3, use_mixed_precision="no")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(calibrate, "DESIGNS", [calibrate.Design(*each) for each in FEW])
    monkeypatch.setattr(calibrate, "LEVELS", 6)


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    model = make_model(folder / "model", tiny_dir)
    short = [lengths for lengths in LENGTHS if max(lengths) < 50][:6]
    return SimpleNamespace(folder=folder, model=model, pairs=make_pairs(short))


def data_of(home, name):
    return pack(home.folder / name, home.pairs, home.model)


def test_measure():
    """Gaussian noise: policy scores of sd 3 with a bias of 2 on chosen, the reference's noise shared by half."""
    rng = np.random.default_rng(0)
    P, D = 400, 50
    clean = rng.normal(size=(P, 1, 2)) * 5
    shared = rng.normal(size=(P, D, 2))
    policy = clean + 1 + 3 * shared + [2, 0]
    reference = clean + 1.5 * shared
    truth_policy = clean + 1 + 0.1 * rng.normal(size=(P, 2, 2))
    truth_reference = clean + 0.1 * rng.normal(size=(P, 2, 2))
    got = calibration.measure(policy, reference, truth_policy, truth_reference)
    assert got["score_variance"] == pytest.approx(9, rel=0.03) and got["score_bias"] == pytest.approx(1, abs=0.05)
    assert got["margin_variance"] == pytest.approx(2 * 1.5**2, rel=0.03)  # two sides; the shared half cancels
    assert got["margin_bias"] == pytest.approx(2, rel=0.02)
    assert got["between_pairs"] < 0.02  # every pair's true margin is 0
    unbiased = calibration.measure(policy - [2, 0], reference, truth_policy, truth_reference)
    assert unbiased["margin_bias"] < 0.1  # the noise of a mean over draws is not taken for a bias


def test_recommend():
    def row(noise, bias):
        return {"noise_x_cost": noise, "margin_bias": bias, "margin_variance": 4.0, "between_pairs": 12.0}

    rows = [row(5, 0.1), row(3, 0.99), row(1, 1.01)]
    assert calibration.recommend(rows) is rows[1]  # the third's bias is above sqrt((4 + 12) / 16)
    assert calibration.recommend([row(1, 3.0), row(2, 1.5)])["margin_bias"] == 1.5


def test_command(few, home, capsys):
    """The table, its files, and auto: the reference job and a run take what it recommends."""
    data = data_of(home, "packed")
    assert call(calibrate.main, "--data", data, *SMALL) == 0
    said = capsys.readouterr().out
    assert said.count("<- recommended") == 1 and "recommended: --estimator" in said
    [path] = data.glob("calibration-*.json")
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert not list(data.glob("*.tmp*")) and not list(data.glob("ref-*"))
    table = json.loads(path.read_text())
    assert [(row["estimator"], row["diffusion_steps"], row["trajectories"]) for row in table["rows"]] == FEW
    assert table["pairs"] == 3 and table["draws"] == 3 and "moved" in table["policy"]
    for row in table["rows"]:
        assert row["score_variance"] > 0 and row["margin_variance"] > 0 and row["seconds"] > 0
        states = 4 if row["estimator"].startswith(("elbo", "stepwise")) else 1 + 2 * (row["diffusion_steps"] - 1)
        assert 1 <= row["passes"] <= states
        assert row["noise_x_cost"] == pytest.approx(row["margin_variance"] * row["passes"])
    best = calibration.recommend(table["rows"])
    assert call(score.main, "--data", data, *AUTO) == 0
    [depends] = depends_of(data)
    assert all(depends[name] == best[name] for name in calibrate.Design._fields)
    arguments = arguments_of(data)
    assert all(getattr(arguments, name) == best[name] for name in calibrate.Design._fields)
    table["rows"][4] |= {"noise_x_cost": 1e-9, "margin_bias": 0.0}  # another winner: auto takes its estimator, too
    path.write_text(json.dumps(table))
    assert call(score.main, "--data", data, *AUTO) == 0
    assert {depends["estimator"] for depends in depends_of(data)} == {best["estimator"], "elbo_stratified"}
    assert arguments_of(data).estimator == "elbo_stratified"
    noise = config.NoiseArguments(estimator="elbo", diffusion_steps="auto")  # given: the best of its own rows
    model_args = config.ModelArguments(model_name_or_path=str(home.model), use_mixed_precision="no")
    calibration.settle(packed.Packed(data), model_args, noise)
    assert (noise.estimator, noise.diffusion_steps, noise.trajectories) == ("elbo", 4, 1)


def test_a_block_causal_model(home, tmp_path, monkeypatch):
    """Its designs draw levels by block, all are unbiased, and auto takes one of them."""
    monkeypatch.setattr(calibrate, "BLOCK_DESIGNS", [calibrate.Design("elbo_stratified", 4, 1)])
    rows = write_rows(tmp_path / "prefs.jsonl", tasks.preference_rows(12, "train", 0))
    new_tiny.main(["--in", str(rows), *map(str, flags(out=tmp_path / "model", family="sdar"))])
    data = ["--data", tmp_path / "packed"]
    call(data_prep.main, "--in", rows, "--out", tmp_path / "packed", "--model_name_or_path", tmp_path / "model")
    assert call(calibrate.main, *data, *SMALL) == 0 and call(score.main, *data, *AUTO) == 0
    [path] = (tmp_path / "packed").glob("calibration-*.json")
    [row] = json.loads(path.read_text())["rows"]
    assert row["passes"] == 4 and row["margin_variance"] > 0
    assert row["margin_bias"] ** 2 < row["between_pairs"] + row["margin_variance"]
    [depends] = depends_of(tmp_path / "packed")
    assert (depends["estimator"], depends["diffusion_steps"], depends["block_size"]) == ("elbo_stratified", 4, 4)


def depends_of(data):
    """What the reference scores there depend on."""
    return [json.loads(path.read_text())["depends_on"] for path in data.glob("ref-*/meta.json")]


def arguments_of(data):
    """The noise arguments that a run with --diffusion_steps auto trains with."""
    groups = train_dpo.read_arguments(["--data", str(data), *AUTO])
    train_dpo.prepare(groups)
    return groups[2]


def test_reuse_calibrates_once(few, home, capsys):
    """With --reuse data without a calibration gets one, for --diffusion_steps auto alone, and then it is up to date."""
    data = data_of(home, "bare")
    assert call(calibrate.main, "--data", data, "--reuse", *SMALL) == 0 and not list(data.glob("calibration-*"))
    auto = ["--diffusion_steps", "auto"]
    assert call(calibrate.main, "--data", data, "--reuse", *auto, *SMALL) == 0
    [path] = data.glob("calibration-*.json")
    before = path.stat().st_mtime_ns
    assert call(calibrate.main, "--data", data, "--reuse", *auto, *SMALL) == 0 and path.stat().st_mtime_ns == before
    assert call(score.main, "--data", data, *AUTO) == 0 and len(depends_of(data)) == 1


def test_policy_and_same_numbers(few, home, tiny_dir):
    """A policy of one's own; the same command makes the same table, but for the seconds."""
    data = data_of(home, "policy")
    tables = []
    for policy in [make_model(home.folder / "other", tiny_dir, seed=1)] * 2:
        assert call(calibrate.main, "--data", data, *SMALL, "--policy", policy) == 0
        [path] = data.glob("calibration-*.json")
        table = json.loads(path.read_text())["rows"]
        for row in table:
            del row["seconds"]
        tables.append(table)
    assert tables[0] == tables[1] and all(row["margin_variance"] > 1e-3 for row in tables[0])


def test_streamed(home, tmp_path):
    """ZeRO-3 on two ranks writes the numbers of one rank without an engine."""
    data = data_of(home, "streamed")
    argv = ["--data", data, *flags(pairs=2, draws=2, use_mixed_precision="no", tokens_per_forward=200)]
    tables = []
    for world, more in ((None, []), (2, ["--deepspeed", "ds_configs/zero3_offload_4080.json"])):
        [did] = run_jobs(tmp_path / str(world), world, [("calibrate", "calibrate", argv + more)]).values()
        assert [rank["error"] for rank in did] == [""] * (world or 1)
        [path] = data.glob("calibration-*.json")
        tables.append(json.loads(path.read_text())["rows"])
        path.unlink()
    for one, two in zip(*tables):
        for name in ("score_variance", "score_bias", "margin_variance", "passes"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-4), (one["estimator"], name)


def test_refusals(few, home, capsys):
    data = data_of(home, "refused")
    for argv, words in (
        (["--pairs", 1], "at least 2 pairs"),
        (["--draws", 1], "at least 2"),
        (["--diffusion_steps", "auto", "--order", "blocks"], "measured in random order"),
        (["--estimator", "elbo", "--order", "blocks"], "goes with stepwise"),
        (["--policy", "nowhere"], "nowhere"),
        (["--policy", home.model], "are those of the reference"),
        (["--diffusion_steps", "some"], "neither a number nor auto"),
    ):
        assert words in refusal(calibrate.main, capsys, "--data", data, *FP32, *argv), argv
    said = refusal(train_dpo.main, capsys, "--data", data, *AUTO)
    assert f"holds no calibration of this model; run: python calibrate.py --data {data}" in said
