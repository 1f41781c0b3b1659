"""Tests of bench/estimators.py: its numbers against what is known of them, on a tiny model.

bash tests/run.sh tests/bench/test_bench_estimators.py
"""

import json
import sys

import numpy as np
import pytest
import torch
from small import LENGTHS, ROOT, make_model, make_pairs, pack, refusal

sys.path.insert(0, str(ROOT / "bench"))
import block_estimators
import estimators


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimators")
    model, policy = make_model(folder / "model", tiny_dir), make_model(folder / "policy", tiny_dir, seed=1)
    return pack(folder / "packed", make_pairs(LENGTHS), model), model, policy


def run(home, path, *more, policy=None):
    """{name: row} of the table."""
    data, model, other = home
    models = ["--data", data, "--model_name_or_path", model, "--policy", policy or other]
    size = ["--lengths", 6, 25, "--pairs", 3, "--draws", 3]
    estimators.main(list(map(str, [*models, *size, "--json", path, *more])))
    return {estimators.name_of(row): row for row in json.loads(path.read_text())["rows"]}


def test_table(home, tmp_path, capsys):
    rows = run(home, tmp_path / "table.json", "--only", "spread 4x5", "spread 2x3", "spread 4x5 k=4")
    assert list(rows) == ["elbo 16x1", "spread 4x5", "elbo 8x1", "elbo 4x1", "spread 2x3", "spread 4x5 k=4"]
    assert [rows[name]["against_elbo"] for name in rows] == [16, 16, 8, 4, 4, 16]
    for name, row in rows.items():
        for positive in ("score_variance", "margin_variance", "gradient_variance", "cost"):
            assert row[positive] > 0
        if name.startswith("elbo"):
            assert row["gradient_ratio"] == 1 and row["gradient_interval"] == [1, 1]
    whole, part = rows["spread 4x5"], rows["spread 4x5 k=4"]
    # the same masks: only the gradient differs
    assert part["score_variance"] == pytest.approx(whole["score_variance"], rel=1e-4)
    assert part["gradient_variance"] > whole["gradient_variance"] and part["cost"] < whole["cost"] == pytest.approx(
        3 * whole["passes"]
    )
    said = capsys.readouterr().out
    assert "states in the gradient" in said and said.count("spread 4x5 k=4") == 2


def test_policy_that_is_the_reference(home, tmp_path):
    """The same masks for both: no margin, whatever the noise of the score."""
    rows = run(home, tmp_path / "same.json", "--only", "spread 2x3", "flat 2x3", policy=home[1])
    assert {"spread 2x3", "flat 2x3"} <= set(rows)
    for row in rows.values():
        assert row["margin_variance"] < 1e-9 < row["score_variance"]


def test_tally():
    """Mean, variance and bias of gradients that are given: numbers worked out by numpy."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(50, 3)) + [1, 2, 3]
    truth, tally = estimators.Tally(), estimators.Tally()
    for mine, gradients in ((tally, draws), (truth, np.tile([[1.0, 2.0, 2.0]], (2, 1)))):
        mine.scores = rng.normal(size=(len(gradients), 4)).tolist()
        mine.sum, mine.squares = torch.from_numpy(gradients.sum(0)), float((gradients**2).sum())
        mine.finish()
    values = tally.against(truth)
    bias2 = ((draws.mean(0) - [1, 2, 2]) ** 2).sum() - draws.var(0, ddof=1).sum() / 50
    assert values.gradient_variance == pytest.approx(draws.var(0, ddof=1).sum())
    assert values.gradient_bias2 == pytest.approx(bias2)
    assert abs(values.gradient_bias2 - 1) < 1


def test_too_few_pairs(home, capsys):
    data, model, policy = home
    models = ["--data", data, "--model_name_or_path", model, "--policy", policy]
    said = refusal(estimators.main, capsys, *models, "--lengths", 500, 600)
    assert "0 pairs have responses" in said


@pytest.mark.long
def test_block_models(tmp_path):
    """Every way is unbiased but for its noise, and with the levels of a block enumerated there is none in the level."""
    path = tmp_path / "table.json"
    few = ["--blocks", 4, "--copies", 4, "--ways", "row", "block", "stratified", "--pairs", 2, "--draws", 2]
    block_estimators.main(list(map(str, [*few, "--steps", 2, "--work", tmp_path, "--json", path])))
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows] == ["row", "block", "stratified"]
    assert rows[1]["score_ratio"] == 1 and all(row["gradient_variance"] > 0 for row in rows)


def test_every_subset_is_the_exact_score():
    """By hand, of a block of two tokens: f(1) is the mean of both alone, f(2) that of both together."""
    masked, weight = block_estimators.every_subset(np.array([0, 0]), 2)
    logps = {(True, False): (-1.0, 0), (False, True): (0, -3.0), (True, True): (-5.0, -7.0)}
    total = sum(float(np.dot(w, logps[tuple(m.tolist())])) for m, w in zip(masked, weight))
    assert total == pytest.approx((-1 - 3) / 2 + (-5 - 7) / 2)
