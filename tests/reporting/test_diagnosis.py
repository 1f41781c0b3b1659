"""Tests of what is read of a run's folder (history.py, scored_pairs.py, evaluations.py), and what is said of it.

bash tests/run.sh tests/reporting/test_diagnosis.py
"""

import html
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from small import ROOT
from written import HOSTILE, Reader, change_log, page_of, score_row, write_run

import files
from reasoning import comparison
from reporting import diagnosis, history, pair_charts, scored_pairs, step_charts, texts


def at(steps, **values):
    """A change for change_log(): `values`, "/" for "__" in their names, in the lines of these steps."""
    named = {name.replace("__", "/"): value for name, value in values.items()}

    def change(line):
        if line["step"] in steps:
            line.update(named)

    return change


EVALUATED = range(10, 41, 10)  # the steps of write_run() after which held-out pairs are scored


def test_last_scores_count(tmp_path):
    """Held-out pairs of the last evaluation: the later of two scores, none of a step that the log does not have."""
    folder = write_run(tmp_path / "a", held=20)
    bad = score_row(40, "eval", 7)
    bad["policy"][0][0] = None
    with open(folder / "scores.jsonl", "a") as file:
        file.write(json.dumps(score_row(40, "eval", 5, scale=10)) + "\n")
        file.write(json.dumps(score_row(50, "eval", 6, scale=10)) + "\n{\n")
        file.write(json.dumps(bad) + "\n")
    scored = history.read(folder).scored
    margin = dict(zip(scored.pair.tolist(), scored.margin))
    assert len(margin) == 19 and scored.unusable == 1 and 7 not in margin
    assert scored.line.tolist() == [pair + 1 for pair in scored.pair]
    assert margin[5] == pytest.approx(0.5 * 10 * 0.2)
    assert margin[6] == pytest.approx(0.5 * 0.3)
    assert margin[19] == pytest.approx(0.5 * 1.6)


def test_training_pairs_where_none_is_held_out(tmp_path):
    scored = history.read(write_run(tmp_path / "a", held=0)).scored
    assert not scored.is_held_out and sorted(scored.pair.tolist()) == list(range(96))
    assert "training pairs" in page_of(tmp_path / "a")


def test_margin_by_step(tmp_path):
    """States 1, 3 are before step 1, states 2, 4 before step 2 of two trajectories: (1, 2 + 2, 3 + 3) / 11 of it."""
    found = history.read(write_run(tmp_path / "a"))
    rewards = pair_charts.step_rewards(found)  # (n, 2, T)
    margin = (rewards[:, 0] - rewards[:, 1]).mean(0)
    assert margin / found.scored.margin.mean() == pytest.approx(np.array([1, 4, 6]) / 11)
    assert pair_charts.step_rewards(history.read(write_run(tmp_path / "b", estimator="elbo"))) is None
    page = page_of(tmp_path / "b")
    assert "<h3>Margin by denoising step" not in page and "levels of elbo are random" in page


@pytest.mark.parametrize(
    "change, said",
    [
        (at(EVALUATED, eval_rewards__accuracies_ci95=[0.4, 0.62]), "cannot be told from chance"),
        (at(EVALUATED, eval_rewards__accuracies_ci95=[0.2, 0.42]), "below chance"),
        (at(EVALUATED, eval_rewards__chosen=-1.0, eval_rewards__rejected=-2.0), "both fall"),
        (at(EVALUATED, eval_rewards__chosen=-2.0, eval_rewards__rejected=-1.0), "did not fall as far"),
        (at([40], eval_loss=0.9), "Held-out loss was lowest after step 30 (0.6700)"),
        (
            at([38, 39, 40], skipped=True, grad_norm=None, loss=None),
            "3 of 40 steps had no finite gradient and changed nothing, the last 3 in a row",
        ),
    ],
)
def test_findings(tmp_path, change, said):
    """What is wrong is said; of a sound run, that nothing is."""
    folder = write_run(tmp_path / "a")
    sound = history.read(folder)
    assert diagnosis.problems(sound) == []
    assert diagnosis.findings(sound) == [diagnosis.no_problem(sound), *sound.missing]
    change_log(folder, change)
    found = history.read(folder)
    [words] = diagnosis.problems(found)
    assert said in words and diagnosis.findings(found) == [words, *found.missing]


def test_length_is_found_out(hostile, tiny_dir, tmp_path):
    """Pair i's chosen has more tokens the larger i is, and so has its margin."""
    found = history.read(write_run(tmp_path / "a", data=hostile, model=tiny_dir))
    chosen, rejected = np.diff(found.packed.bounds[:, 1:]).T
    r = np.corrcoef(chosen - rejected, np.arange(20))[0, 1]
    assert scored_pairs.correlation(found.scored.longer, found.scored.margin).r == pytest.approx(r, abs=1e-6)
    assert any(words.startswith(f"Length explains {r * r:.0%} ") for words in diagnosis.findings(found))


def test_interval_of_a_correlation():
    """95% of the intervals, or nearly so, hold the correlation of 0.5 that the samples were drawn with."""
    x, noise = np.random.default_rng(0).normal(size=(2, 100, 40))
    intervals = [scored_pairs.correlation(a, 0.5 * a + 0.75**0.5 * b) for a, b in zip(x, noise)]
    assert 88 <= sum(found.low < 0.5 < found.high for found in intervals) < 100


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
    change_log(folder, at(EVALUATED, eval_rewards__chosen=chosen, eval_rewards__rejected=rejected))
    found = list(diagnosis.both_fall(history.read(folder)))
    assert (found == []) if said is None else said in found[0]


def test_an_evaluation_without_a_finite_loss(tmp_path):
    folder = write_run(tmp_path / "a")
    change_log(folder, at([40], eval_loss=None, eval_rewards__margins=None))
    words = diagnosis.findings(history.read(folder))
    assert any("evaluation after step 40 has no finite loss" in each for each in words)
    page_of(folder)


def test_ipo_without_its_tokens(tmp_path):
    """Rewards of ipo are per token: without the packed arrays there are none, instead of wrong ones."""
    found = history.read(write_run(tmp_path / "a", loss_type="ipo"))
    assert found.scored is None and any("per token" in words for words in found.missing)
    page_of(tmp_path / "a")


def test_an_adapter_asks_for_no_base(hostile, tiny_dir, tmp_path, monkeypatch):
    """The tokenizer in an adapter's folder would have its base's config read, which may be on the Hub."""

    def snapshot_download(name, local_files_only=False, **_):
        assert local_files_only, f"downloads {name}"
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    folder = write_run(tmp_path / "a", data=hostile, model="org/base")
    (folder / "final" / "config.json").unlink()
    (folder / "final" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    found = history.read(folder)
    texts.load_tokenizer(found)
    assert found.packed is not None


def test_no_home_in_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path) not in page_of(write_run(tmp_path / "runs" / "a"))


def test_a_resumed_run(tmp_path):
    folder = write_run(tmp_path / "a")
    record = files.read_json(folder / "run.json", "")
    record["starts"] += [{"after_step": step, "time": ""} for step in (20, 30)]
    files.write_json(folder / "run.json", files.sealed(record))
    found = history.read(folder)
    assert not diagnosis.problems(found)
    assert "The run was stopped and resumed after step 20, 30." in diagnosis.findings(found)


def test_sft(tmp_path):
    page = page_of(write_run(tmp_path / "a", loss_type="sft"))
    assert "held-out loss" in page and "get most wrong" not in page.replace("gets", "get")
    assert len(re.findall("<svg", page)) == 5


def test_a_long_run(tmp_path):
    """60,000 steps are drawn as means, and said to be, on a page of less than a megabyte."""
    folder = write_run(tmp_path / "a", steps=1)
    line = json.loads((folder / "log.jsonl").read_text())
    rng = np.random.default_rng(0)
    with open(folder / "log.jsonl", "w") as file:
        for step in range(1, 60001):
            file.write(json.dumps(line | {"step": step, "epoch": step / 10, "loss": float(rng.random())}) + "\n")
    page = page_of(folder)
    assert "60000 training steps, drawn as means of 200" in page and len(page) < 1_000_000
    bins = step_charts.put_together(np.arange(60000), np.arange(60000.0))
    assert len(bins.step) == 300 and bins.size == 200
    assert bins.mean[0] == 99.5 and bins.lowest[1] == 200 and bins.highest[1] == 399


def test_not_measured(tmp_path, capsys):
    """Of a finished run that evaluate.py has not measured, page and command line say so, with the command."""
    folder = write_run(tmp_path / "runs" / "a b", use_mixed_precision="no", load_in_4bit=True, model="org/base")
    command = diagnosis.evaluate_command(history.read(folder))
    assert command == (
        f"python evaluate.py --model '{folder}/final' --compare org/base --use_mixed_precision no "
        f"--load_in_4bit true --output_dir '{folder}/evaluation'"
    )
    page, printed = page_of(folder), capsys.readouterr().out
    assert command in printed and command in html.unescape(page)
    assert "Held-out accuracy does not tell whether the model reasons better" in page
    assert 0 < page.index("No problem found: the run is finished") < page.index('class="tiles"')
    shutil.rmtree(folder / "final")
    assert not diagnosis.not_measured(history.read(folder), [])


def test_flags_of_the_evaluation(tmp_path, monkeypatch):
    """Weights that training streamed are streamed again; ~ is left to the shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ROOT / "ds_configs" / "zero3_offload_4080.json"
    command = diagnosis.evaluate_command(history.read(write_run(tmp_path / "a", deepspeed=str(config))))
    assert f"--deepspeed {config}" in command and "--model ~/a/final" in command
    config = ROOT / "ds_configs" / "zero2_offload_4080.json"
    run = write_run(tmp_path / "b", deepspeed=str(config))
    assert "--deepspeed" not in diagnosis.evaluate_command(history.read(run))
    config = ROOT / "ds_configs" / "zero3.json"  # several cards held the weights, and evaluate.py has one
    command = diagnosis.evaluate_command(history.read(write_run(tmp_path / "c", deepspeed=str(config))))
    assert "--deepspeed ds_configs/zero3_offload_4080.json" in command


@pytest.fixture
def evaluated(tmp_path):
    """A run, and beside it what evaluate.py writes of five items; the models differ in item 3."""
    folder, other = write_run(tmp_path / "runs" / "a"), tmp_path / "runs" / "compared"
    other.mkdir()
    rows, table = {}, []
    for model in ("new", "old"):
        rows[model] = [
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
        name = f"{model}-lm_eval-t.jsonl"
        (other / name).write_text("".join(json.dumps(row) + "\n" for row in rows[model]))
        first = rows["new"] if model == "old" else None
        table.append(comparison.summary("lm_eval:t", model, rows[model], first) | {"file": name})
    models = {"new": {"path": os.path.relpath(folder / "final")}, "old": {"path": "examples/tiny"}}
    results = {"models": models, "table": table, "files": [line["file"] for line in table]}
    (other / "results.json").write_text(json.dumps(results))
    return SimpleNamespace(run=folder, evaluation=other)


def test_evaluation_of_several_samples(evaluated):
    """pass@k and the majority have rows; base, adapter and sampler are named; of an item the first answer is shown."""
    path = evaluated.evaluation / "results.json"
    results = json.loads(path.read_text())
    answers = evaluated.evaluation / results["table"][0]["file"]
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    rows = [row | {"sample": j, "vote": 0, "response": f"said {j}"} for row in rows for j in range(2)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"base": "org/base", "adapter": "runs/a/final", "sampler": "--gen_length 256"}
    results["table"][0] = comparison.summary("lm_eval:t", "new", rows, None) | {"file": answers.name} | about
    path.write_text(json.dumps(results))
    page = page_of(evaluated.run)
    assert "<td>pass@2</td>" in page and "<td>majority@2</td>" in page
    assert "lm_eval:t, new: base org/base, adapter runs/a/final; --gen_length 256" in page
    assert "said 0" in page and "said 1" not in page


def test_evaluation(evaluated, tmp_path, capsys):
    """evaluate.py's table of the run's final/, found beside the run; items that are judged differently come first."""
    page = page_of(evaluated.run)
    assert "1 won, 0 lost, p = 1" in page and "1 of 5 items" in page and "script" not in Reader(page).tags
    assert re.findall(r"item (\d)", page) == ["3", "0", "1", "2", "4"]
    assert "evaluate.py has not been run" not in page
    assert os.path.relpath(evaluated.evaluation / "results.json") in capsys.readouterr().out
    elsewhere = tmp_path / "elsewhere"
    shutil.move(evaluated.evaluation, elsewhere)
    assert "item 3" not in page_of(evaluated.run)
    assert "item 3" in page_of(evaluated.run, "--evaluation", elsewhere)
