"""Tests of calibrate.py: what it measures on gradients whose numbers are known, what it recommends, the command itself.

bash tests/run.sh tests/scoring/test_calibrate.py
"""

import json
import shutil
from types import SimpleNamespace

import new_tiny
import numpy as np
import pytest
import torch
from prepared import write_rows
from safetensors.torch import load_file, save_file
from small import LENGTHS, alone, call, flags, make_model, make_pairs, pack, refusal, run_jobs

import calibrate
import config
import data_prep
import score
import train_dpo
from models import architecture, checkpoint
from preferences import packed
from reasoning import tasks
from scoring import calibration, noise, recipe, signal
from training import engine

FEW = [("spread", 2, 2), ("spread", 3, 2), ("stepwise", 4, 1), ("elbo", 4, 1), ("elbo_stratified", 4, 1)]
FP32 = flags(use_mixed_precision="no")
AUTO = flags(diffusion_steps="auto", use_mixed_precision="no")
SMALL = flags(pairs=3, draws=2, use_mixed_precision="no", tokens_per_forward=200)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(calibration, "DESIGNS", [calibration.Design(*each) for each in FEW])
    monkeypatch.setattr(calibrate, "LEVELS", 6)


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    model = make_model(folder / "model", tiny_dir)
    short = [lengths for lengths in LENGTHS if max(lengths) < 50][:6]
    return SimpleNamespace(folder=folder, model=model, pairs=make_pairs(short))


def data_of(home, name):
    return pack(home.folder / name, home.pairs, home.model)


def measurement_of(data, **options):
    """The Measurement of some packed pairs, and its masking. Called in alone()."""
    model_args = config.ModelArguments(use_mixed_precision="no", **options)
    noise_args, pairs = config.NoiseArguments(), packed.Packed(data)
    masking = recipe.check(pairs, model_args, noise_args)
    args = calibrate.CalibrateArguments(pairs=3)
    return calibrate.prepare(pairs, model_args, noise_args, args, masking, engine.start())


# --- pure functions ---------------------------------------------------------------------------------------


def synthetic(rng, P, D=2, K=40):
    """(gradients (P, D, K), truth (P, K)): mean squares 16 of what is shared, 40 between pairs, 90 of noise.

    The mean of the gradients is off by a vector of square 4 from the truth's, whose own noise is 10.
    """
    shared, off = np.zeros(K), np.zeros(K)
    shared[0], off[1] = np.sqrt(12.0), 2.0
    of_pair = shared + rng.normal(size=(P, K))
    gradients = (of_pair + off)[:, None] + 1.5 * rng.normal(size=(P, D, K))
    return gradients, of_pair + 0.5 * rng.normal(size=(P, K))


def test_measure():
    """Shares of own = 16 + 40 + 90; many pairs give them, and few pairs on average: noise is taken for nothing else."""
    rng = np.random.default_rng(0)
    got = signal.measure(*synthetic(rng, 1500))
    for name, want in (("signal", 16), ("between", 40), ("noise", 90)):
        assert got[name] == pytest.approx(want / 146, rel=0.05), name
    assert got["bias"] == pytest.approx(4 / 12, rel=0.1)
    few = [signal.measure(*synthetic(rng, 8)) for _ in range(800)]
    signals, biases = ([each[name] for each in few] for name in ("signal", "bias"))
    assert np.mean(signals) == pytest.approx(16 / 146, abs=4 * np.std(signals) / 800**0.5 + 0.003)
    assert np.median(biases) == pytest.approx(4 / 12, rel=0.15)
    assert np.mean([each["signal_error"] for each in few]) == pytest.approx(np.std(signals), rel=0.2)
    unbiased = signal.measure(synthetic(rng, 1500)[0] - np.eye(40)[1] * 2, synthetic(rng, 1500)[1])
    assert abs(unbiased["bias"]) < 0.03


def test_leaving_out():
    """The Estimates without a pair are what the other pairs alone give."""
    gradients = np.random.default_rng(0).normal(size=(6, 3, 4))
    by_pair = gradients.sum(1)
    got, alone_ = signal.across(by_pair @ by_pair.T), np.delete(by_pair, 2, axis=0)
    want = [a @ b for i, a in enumerate(alone_) for j, b in enumerate(alone_) if i != j]
    assert got.without[2] == pytest.approx(np.mean(want))
    assert signal.mean(by_pair[:, 0]).without[2] == pytest.approx(alone_[:, 0].mean())
    assert signal.shares(gradients).without[2] == pytest.approx(signal.shares(np.delete(gradients, 2, axis=0)).value)


def test_shares():
    """Pairs agree in the last bin and, a third as much along the same direction, in bin 3; the others are noise."""
    rng = np.random.default_rng(0)
    by_level = 3 * rng.normal(size=(1500, signal.BINS, 20))
    by_level[:, 7, 0] += 3
    by_level[:, 3, 0] += 1
    got = signal.shares(by_level)
    assert got.value.sum() == pytest.approx(1)
    assert (abs(got.value - [0, 0, 0, 0.25, 0, 0, 0, 0.75]) < 3 * got.error).all() and got.error.max() < 0.05


def test_level_bins():
    masked = np.tril(np.ones((9, 9), bool))  # l = 1..9 of 9 hidden
    assert signal.level_bins(masked)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    masked, block = np.array([[0, 0, 1, 1, 1, 0, 0, 0, 1]], bool), np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
    fixed = np.array([0, 0, 0, 1, 0, 0, 0, 1, 0], bool)
    masked &= ~fixed
    assert signal.level_bins(masked, block, fixed).tolist() == [[2] * 3 + [2] * 4 + [7] * 2]  # 1/3, 1/3, 1/1


def test_recommend():
    """Within a standard error of the difference on the same pairs, not of each signal: the fewest passes."""

    def row(name, passes, signals, bias=0.0):
        return {"name": name, "passes": passes, "signal": np.mean(signals), "without": signals, "bias": bias}

    noise_of_pairs = 0.01 * np.random.default_rng(0).normal(size=8)  # what both designs share
    best = row("best", 16, 0.10 + noise_of_pairs)
    near = row("near", 8, 0.0999 + noise_of_pairs + 0.0002 * (-1.0) ** np.arange(8))
    far = row("far", 1, 0.09 + noise_of_pairs)
    assert calibration.cheapest([best, near, far]) is near
    assert calibration.cheapest([best, far]) is best
    assert calibration.densest([best, near, far]) is far
    one_sided = row("one-sided", 1, 0.5 + noise_of_pairs, bias=1.5)  # its mean gradient is more wrong than right
    assert calibration.cheapest([one_sided, best, near, far]) is near
    assert calibration.densest([one_sided, best, near]) is near
    assert calibration.cheapest([one_sided]) is one_sided


# --- gradients of a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_sketch(home, recompute):
    """In passes of few tokens: sums over tokens of output times gradient at every block's output, by plain autograd."""
    data = data_of(home, f"sketch-{recompute}")
    with alone():
        measurement = measurement_of(data, tokens_per_forward=60, gradient_checkpointing=recompute)
        index = measurement.pairs[-1]
        drawn = [measurement.draw(index, side, calibration.Design("spread", 3, 2), 0) for side in (0, 1)]
        got, passes = measurement.gradient(index, drawn)
        twice, _ = measurement.gradient(index, drawn)
    assert got.shape == (2 * 32,) and passes == 10 and (got == twice).all()  # nothing is left of the first
    assert not any(parameter.requires_grad for parameter in measurement.model.parameters())

    model, outputs = checkpoint.load_model(str(home.model), torch.float32), {}
    for block in architecture.block_modules(model):
        block.register_forward_hook(lambda block, _, output: outputs.setdefault(block, []).append(output))
    margin, (prompt, *responses) = 0, measurement.packed[index]
    for sign, response, each in zip((1, -1), responses, drawn):
        margin += sign * score.diffusion_score(model, prompt, response, *each[:2], measurement.masking).sum()
    of_block = list(outputs.values())
    gradients = torch.autograd.grad(margin, sum(of_block, []))
    products = [(x * by_x).flatten(0, 1).sum(0) for x, by_x in zip(sum(of_block, []), gradients)]
    want = torch.cat([sum(products[:2]), sum(products[2:])]).detach()  # chosen and rejected, of each block
    assert torch.from_numpy(got).allclose(want, rtol=1e-3, atol=1e-4)


def test_truth(home):
    """The gradients of the bins add up to that of the sum over every level, and each level is there once."""
    with alone():
        measurement = measurement_of(data_of(home, "truth"), tokens_per_forward=200)
        with calibrate.progress(9, "pair", "", disable=True) as bar:
            by_level, passes = measurement.of_truth(bar)
        whole = []
        for index in measurement.pairs:
            drawn = [measurement.draw(index, side, None, 0) for side in (0, 1)]
            for each in drawn:
                n = each.masked.shape[1]
                assert each.masked.sum(1).tolist() == list(range(1, n + 1))
                assert np.allclose(each.weight, each.masked / each.masked.sum(1, keepdims=True))
            whole.append(measurement.gradient(index, drawn)[0])
    assert by_level.shape == (3, signal.BINS, 64) and passes == sum(map(sum, map(responses_of, measurement.pairs)))
    assert np.allclose(by_level.sum(1), np.stack(whole), rtol=1e-3, atol=1e-3)
    assert calibrate.most_passes(measurement, 2) == passes + 6 * 2 * sum(
        noise.state_count(*each) for each in calibration.DESIGNS
    )


def responses_of(index):
    return [lengths for lengths in LENGTHS if max(lengths) < 50][index][1:]


# --- the command ------------------------------------------------------------------------------------------


def test_command(few, home, capsys):
    """The table, its files, and auto: the reference job and a run take what it recommends where pairs are few."""
    data = data_of(home, "packed")
    assert call(calibrate.main, "--data", data, *SMALL) == 0
    said = capsys.readouterr().out
    assert "few pairs (pairs are the limit): --estimator" in said and "most hidden last: " in said
    [path] = data.glob("calibration-*.json")
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert not list(data.glob("*.tmp*")) and not list(data.glob("ref-*"))
    table = json.loads(path.read_text())
    assert [(row["estimator"], row["diffusion_steps"], row["trajectories"]) for row in table["rows"]] == FEW
    assert table["pairs"] == 3 and table["draws"] == 2 and table["price"]["seconds"] > 0
    per_pair = sum(row["passes"] for row in table["rows"]) * 2 * 2
    assert 3 * per_pair < table["price"]["passes"] <= most_passes(said)
    assert table["price"]["epochs"] == table["price"]["passes"] / (6 * 2 * 4)
    assert sum(table["levels"]["share"]) == pytest.approx(1) and len(table["levels"]["error"]) == signal.BINS
    for row in table["rows"]:
        assert row["signal"] + row["noise"] + row["between"] == pytest.approx(1) and row["noise"] > 0.01
        states = 4 if row["estimator"].startswith(("elbo", "stepwise")) else 1 + 2 * (row["diffusion_steps"] - 1)
        assert 1 <= row["passes"] <= states
    best = calibration.cheapest(table["rows"])
    assert table["few_pairs"] == {name: best[name] for name in calibration.Design._fields}
    assert call(score.main, "--data", data, *AUTO) == 0
    [depends] = depends_of(data)
    assert all(depends[name] == best[name] for name in calibration.Design._fields)
    arguments = arguments_of(data)
    assert all(getattr(arguments, name) == best[name] for name in calibration.Design._fields)
    other = "elbo_stratified" if best["estimator"] != "elbo_stratified" else "spread"
    [row] = [row for row in table["rows"] if row["estimator"] == other][-1:]
    row |= {"signal": 2.0, "without": [2.0, 2.0, 2.0], "bias": 0.0}  # another winner: auto takes its estimator, too
    path.write_text(json.dumps(table))
    assert call(score.main, "--data", data, *AUTO) == 0
    assert {depends["estimator"] for depends in depends_of(data)} == {best["estimator"], other}
    assert arguments_of(data).estimator == other
    noise_args = config.NoiseArguments(estimator="elbo", diffusion_steps="auto")  # given: the best of its own rows
    model_args = config.ModelArguments(model_name_or_path=str(home.model), use_mixed_precision="no")
    calibration.settle(packed.Packed(data), model_args, noise_args)
    assert (noise_args.estimator, noise_args.diffusion_steps, noise_args.trajectories) == ("elbo", 4, 1)


def test_a_block_causal_model(tmp_path, monkeypatch, capsys):
    """Its designs draw levels by block, whose gradients add up to the truth's, and auto takes one of them."""
    monkeypatch.setattr(calibration, "BLOCK_DESIGNS", [calibration.Design("elbo_stratified", 4, 1)])
    rows = write_rows(tmp_path / "prefs.jsonl", tasks.preference_rows(12, "train", 0))
    new_tiny.main(["--in", str(rows), *map(str, flags(out=tmp_path / "model", family="sdar"))])
    data = ["--data", tmp_path / "packed"]
    call(data_prep.main, "--in", rows, "--out", tmp_path / "packed", "--model_name_or_path", tmp_path / "model")
    capsys.readouterr()
    assert call(calibrate.main, *data, *SMALL) == 0
    most = most_passes(capsys.readouterr().out)
    assert call(score.main, *data, *AUTO) == 0
    [path] = (tmp_path / "packed").glob("calibration-*.json")
    table = json.loads(path.read_text())
    [row] = table["rows"]
    assert row["passes"] == 4 and 0 < row["noise"] < 1
    assert 0.5 * most < table["price"]["passes"] <= most
    shares = np.array(table["levels"]["share"])  # 1 to 4 of a block's 4 tokens are hidden, fewer where it is cut
    assert (shares[[1, 3, 5, 7]] != 0).all() and sum(shares) == pytest.approx(1)
    [depends] = depends_of(tmp_path / "packed")
    assert (depends["estimator"], depends["diffusion_steps"], depends["block_size"]) == ("elbo_stratified", 4, 4)


def most_passes(said):
    """The price that is printed before the work begins."""
    return int(said.partition("calibration: at most ")[2].partition(" ")[0].replace(",", ""))


def depends_of(data):
    """What the reference scores there depend on."""
    return [json.loads(path.read_text())["depends_on"] for path in data.glob("ref-*/meta.json")]


def arguments_of(data):
    """The noise arguments that a run with --diffusion_steps auto trains with."""
    groups = train_dpo.read_arguments(["--data", str(data), *AUTO])
    train_dpo.prepare(groups)
    return groups[2]


def test_reuse_calibrates_once(few, home, monkeypatch):
    """With --reuse data without a calibration gets one, for --diffusion_steps auto alone, and then it is up to date."""
    data = data_of(home, "bare")
    assert call(calibrate.main, "--data", data, "--reuse", *SMALL) == 0 and not list(data.glob("calibration-*"))
    auto = ["--diffusion_steps", "auto"]
    assert call(calibrate.main, "--data", data, "--reuse", *auto, *SMALL) == 0
    [path] = data.glob("calibration-*.json")
    before = path.stat().st_mtime_ns
    assert call(calibrate.main, "--data", data, "--reuse", *auto, *SMALL) == 0 and path.stat().st_mtime_ns == before
    assert call(score.main, "--data", data, *AUTO) == 0 and len(depends_of(data)) == 1
    monkeypatch.setattr(calibration, "DESIGNS", calibration.DESIGNS[:2])  # another version would measure others
    model_args = config.ModelArguments(model_name_or_path=str(home.model), use_mixed_precision="no")
    assert calibration.place(packed.Packed(data), model_args) != path


def test_streamed(home, tmp_path):
    """ZeRO-3 on two ranks writes the numbers of one rank without an engine, which has its passes as auto."""
    data = data_of(home, "streamed")
    argv = ["--data", data, *flags(pairs=3, draws=2, use_mixed_precision="no")]
    assert call(calibrate.main, *argv) == 0
    [path] = data.glob("calibration-*.json")
    tables = [json.loads(path.read_text())]
    path.unlink()
    argv += flags(deepspeed="ds_configs/zero3_offload_4080.json", tokens_per_forward=200)
    [did] = run_jobs(tmp_path / "ranks", 2, [("calibrate", "calibrate", argv)]).values()
    assert [rank["error"] for rank in did] == ["", ""]
    tables.append(json.loads(path.read_text()))
    for one, two in zip(*(table["rows"] for table in tables)):
        for name in ("signal", "signal_error", "noise", "bias", "passes"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-4), (one["estimator"], name)
    assert tables[0]["levels"]["share"] == pytest.approx(tables[1]["levels"]["share"], rel=1e-3, abs=1e-3)


def test_refusals(few, home, capsys, monkeypatch):
    data = data_of(home, "refused")
    for argv, words in (
        (["--pairs", 2], "at least 3 pairs"),
        (["--draws", 1], "--draws 2"),
        (["--diffusion_steps", "auto", "--order", "blocks"], "measured in random order"),
        (["--estimator", "elbo", "--order", "blocks"], "goes with stepwise"),
        (["--diffusion_steps", "some"], "neither a number nor auto"),
        (["--policy", "runs/default/final"], "--policy"),
    ):
        assert words in refusal(calibrate.main, capsys, "--data", data, *FP32, *argv), argv
    said = refusal(train_dpo.main, capsys, "--data", data, *AUTO)
    assert f"holds no calibration of this model; run: python calibrate.py --data {data}" in said
    monkeypatch.setattr(architecture, "block_modules", lambda model: [])
    assert "has no list of blocks" in refusal(calibrate.main, capsys, "--data", data, *SMALL)


def test_a_broken_model(few, home, capsys, tmp_path):
    broken = shutil.copytree(home.model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.transformer.ln_f.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    data = data_of(SimpleNamespace(folder=tmp_path, model=broken, pairs=home.pairs), "packed")
    assert "are 0 or not finite" in refusal(calibrate.main, capsys, "--data", data, *SMALL)
