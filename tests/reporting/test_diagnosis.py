"""Tests of history.py and diagnosis.py: what is read of a run's folder, and what is said of it.

.venv/bin/python -m pytest -q tests/test_diagnosis.py
"""

import json
import os
import re
import shutil

import numpy as np
import pytest
from written import HOSTILE, Reader, change_log, page_of, score_row, write_run

import files
from reasoning import comparison
from reporting import charts, diagnosis, history


def test_last_scores_count(tmp_path):
    """Held-out pairs of the last evaluation; of one that was made twice, the later; none of a step that the log does not have."""
    folder = write_run(tmp_path / "a", held=20)
    with open(folder / "scores.jsonl", "a") as file:
        file.write(
            json.dumps(score_row(40, "eval", 5, scale=10))
            + "\n"
            + json.dumps(score_row(50, "eval", 6, scale=10))
            + "\n{\n"
        )
        bad = score_row(40, "eval", 7)
        bad["policy"][0][0] = None
        file.write(json.dumps(bad) + "\n")
    scored = history.read(folder).scored
    found = dict(zip(scored.pair.tolist(), scored.margin))
    assert (
        len(found) == 19
        and scored.unusable == 1
        and 7 not in found
        and scored.line.tolist() == [pair + 1 for pair in scored.pair]
    )
    assert (
        found[5] == pytest.approx(0.5 * 10 * 0.2)
        and found[6] == pytest.approx(0.5 * 0.3)
        and found[19] == pytest.approx(0.5 * 1.6)
    )


def test_training_pairs_where_none_is_held_out(tmp_path):
    scored = history.read(write_run(tmp_path / "a", held=0)).scored
    assert not scored.held and sorted(scored.pair.tolist()) == list(range(96))
    assert "training pairs" in page_of(tmp_path / "a")


def test_margin_by_step(tmp_path):
    """States 1, 3 are before step 1 and 2, 4 before step 2 of two trajectories: (1, 2 + 2, 3 + 3) / 11 of the margin."""
    found = history.read(write_run(tmp_path / "a"))
    rewards = charts.step_rewards(found)  # (n, 2, T)
    margin = (rewards[:, 0] - rewards[:, 1]).mean(0)
    assert margin / found.scored.margin.mean() == pytest.approx(np.array([1, 4, 6]) / 11)
    assert charts.step_rewards(history.read(write_run(tmp_path / "b", estimator="elbo"))) is None
    page = page_of(tmp_path / "b")
    assert "<h3>Margin by denoising step" not in page and "levels of elbo are drawn at random" in page


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda line: line.update({"eval_rewards/accuracies_ci95": [0.4, 0.62]}) if "eval_loss" in line else None,
            "cannot be told from chance",
        ),
        (
            lambda line: line.update({"eval_rewards/accuracies_ci95": [0.2, 0.42]}) if "eval_loss" in line else None,
            "below chance",
        ),
        (
            lambda line: (
                line.update({"eval_rewards/chosen": -1.0, "eval_rewards/rejected": -2.0})
                if "eval_loss" in line
                else None
            ),
            "both fall",
        ),
        (
            lambda line: (
                line.update({"eval_rewards/chosen": -2.0, "eval_rewards/rejected": -1.0})
                if "eval_loss" in line
                else None
            ),
            "did not fall as far",
        ),
        (
            lambda line: line.update({"eval_loss": 0.9}) if line["step"] == 40 else None,
            "Held-out loss was lowest after step 30 (0.6700)",
        ),
        (
            lambda line: line.update({"skipped": True, "grad_norm": None, "loss": None}) if line["step"] > 37 else None,
            "3 of 40 steps had no finite gradient and changed nothing, the last 3 in a row",
        ),
    ],
)
def test_findings(tmp_path, change, said):
    """What is wrong is said; of a sound run, nothing is."""
    folder = write_run(tmp_path / "a")
    missing = history.read(folder).missing
    assert diagnosis.findings(history.read(folder)) == missing
    change_log(folder, change)
    [words] = diagnosis.findings(history.read(folder))[: -len(missing)]
    assert said in words


def test_length_is_found_out(hostile, tiny_dir, tmp_path):
    """Pair i's chosen has more tokens the larger i is, and so has its margin."""
    folder = write_run(tmp_path / "a", data=hostile, model=tiny_dir)
    found = history.read(folder)
    r = np.corrcoef(
        np.diff(found.packed.bounds[:, 1:3])[:, 0] - np.diff(found.packed.bounds[:, 2:])[:, 0], np.arange(20)
    )[0, 1]
    assert history.correlation(found.scored.longer, found.scored.margin)[0] == pytest.approx(r, abs=1e-6)
    assert any(words.startswith(f"Length explains {r * r:.0%} ") for words in diagnosis.findings(found))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4000))
    drawn = [(a, 0.5 * a + 0.75**0.5 * b) for a, b in zip(np.split(x, 100), np.split(y, 100))]  # of correlation 0.5
    assert 88 <= sum(low < 0.5 < high for _, low, high in (history.correlation(*pairs) for pairs in drawn)) < 100


@pytest.mark.parametrize(
    "chosen, rejected, said",
    [
        (-0.5, -0.7, "Rejected ones fell further, to -0.700"),
        (-0.5, -0.2, "rejected ones, at -0.200, did not fall as far"),
        (-0.5, 0.7, "while rejected ones rose, to +0.700"),
        (-1e-8, -2e-8, None),
        (0.2, -3, None),
    ],
)
def test_both_fall(tmp_path, chosen, rejected, said):
    folder = write_run(tmp_path / "a")
    change_log(
        folder,
        lambda line: (
            line.update({"eval_rewards/chosen": chosen, "eval_rewards/rejected": rejected})
            if "eval_loss" in line
            else None
        ),
    )
    found = list(diagnosis.both_fall(history.read(folder)))
    assert (found == []) if said is None else said in found[0]


def test_an_evaluation_without_a_finite_loss(tmp_path):
    folder = write_run(tmp_path / "a")
    change_log(
        folder,
        lambda line: line.update({"eval_loss": None, "eval_rewards/margins": None}) if line["step"] == 40 else None,
    )
    assert any(
        "evaluation after step 40 has no finite loss" in words for words in diagnosis.findings(history.read(folder))
    )
    page_of(folder)


def test_ipo_without_its_tokens(tmp_path):
    """Rewards of ipo are per token: without the packed arrays there are none, instead of wrong ones."""
    found = history.read(write_run(tmp_path / "a", loss_type="ipo"))
    assert found.scored is None and any("per token" in words for words in found.missing)
    page_of(tmp_path / "a")


def test_an_adapter_asks_for_no_base(hostile, tiny_dir, tmp_path, monkeypatch):
    """The tokenizer in an adapter's folder would have its base's config read, which may be on the hub."""
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, local_files_only=False, **_: (_ for _ in ()).throw(
            OSError("not in the cache") if local_files_only else AssertionError(f"downloads {name}")
        ),
    )
    folder = write_run(tmp_path / "a", data=hostile, model="org/base")
    (folder / "final" / "config.json").unlink()
    (folder / "final" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    found = history.read(folder)
    history.load_tokenizer(found)
    assert found.packed is not None


def test_no_home_in_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path) not in page_of(write_run(tmp_path / "runs" / "a"))


def test_a_run_that_went_on(tmp_path):
    folder = write_run(tmp_path / "a")
    record = files.read_json(folder / "run.json", "")
    files.write_json(
        folder / "run.json",
        files.sealed(record | {"starts": record["starts"] + [{"after_step": n, "time": ""} for n in (20, 30)]}),
    )
    assert "The run was stopped and gone on with after step 20, 30." in diagnosis.findings(history.read(folder))


def test_sft(tmp_path):
    page = page_of(write_run(tmp_path / "a", loss_type="sft"))
    assert (
        "held-out loss" in page
        and len(re.findall("<svg", page)) == 5
        and "get most wrong" not in page.replace("gets", "get")
    )


def test_a_long_run(tmp_path):
    """60,000 steps are drawn as means, and said to be, on a page of less than a megabyte."""
    folder = write_run(tmp_path / "a", steps=1)
    line = json.loads((folder / "log.jsonl").read_text())
    rng = np.random.default_rng(0)
    with open(folder / "log.jsonl", "w") as file:
        for step in range(1, 60001):
            file.write(json.dumps(line | {"step": step, "epoch": step / 10, "loss": float(rng.random())}) + "\n")
    page = page_of(folder)
    assert "60000 steps, drawn as means of 200" in page and len(page) < 1_000_000
    steps, mean, low, high, size = charts.thin(np.arange(60000), np.arange(60000.0))
    assert len(steps) == 300 and size == 200 and mean[0] == 99.5 and low[1] == 200 and high[1] == 399


def test_evaluation(tmp_path, capsys):
    """evaluate.py's table of the run's final/, found beside the run; items that are judged differently stand first."""
    folder = write_run(tmp_path / "runs" / "a")
    other = tmp_path / "runs" / "compared"
    other.mkdir()
    rows = {
        model: [
            {
                "task": "lm_eval:t",
                "id": str(i),
                "model": model,
                "prompt": f"{HOSTILE} {i}",
                "response": f"{model} says {i}",
                "answer": "4",
                "correct": i != 3 or model == "new",
            }
            for i in range(5)
        ]
        for model in ("new", "old")
    }
    table = [
        comparison.summary("lm_eval:t", model, rows[model], rows["new"] if model == "old" else None)
        | {"file": f"{model}-lm_eval-t.jsonl"}
        for model in rows
    ]
    for model in rows:
        (other / f"{model}-lm_eval-t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[model]))
    results = {
        "models": {"new": {"path": os.path.relpath(folder / "final")}, "old": {"path": "examples/tiny"}},
        "table": table,
        "files": ["new-lm_eval-t.jsonl", "old-lm_eval-t.jsonl"],
    }
    (other / "results.json").write_text(json.dumps(results))
    page = page_of(folder)
    assert "1 won, 0 lost, p = 1" in page and "1 of 5 items" in page and "script" not in Reader(page).tags
    assert re.findall(r"item (\d)", page) == ["3", "0", "1", "2", "4"]
    assert os.path.relpath(other / "results.json") in capsys.readouterr().out
    shutil.move(other, tmp_path / "elsewhere")
    assert "item 3" not in page_of(folder) and "item 3" in page_of(folder, "--evaluation", tmp_path / "elsewhere")
