"""Tests of the leak check: which questions prompts hold, and what evaluate.py leaves out of what a run was trained on.

bash tests/run.sh tests/reasoning/test_leaks.py
"""

import json
import random
import shutil

import pytest
from answered import SAMPLE, TINY, evaluated, read
from small import ROOT, call, flags, refusal, run

import data_prep
import evaluate
from reasoning import benchmarks, leaks, tasks

# --- one question -----------------------------------------------------------------------------------------

STORY = "Mina packs 14 boxes of tea on Monday and twice as many on Friday. How many boxes does she pack on both days?"


@pytest.mark.parametrize(
    "wrapped",
    [
        STORY,
        f"Question: {STORY}\nAnswer:",
        f"<|user|>\nBe brief. {STORY}<|end|>\n<|assistant|>\n",
        STORY.upper().replace(" ", "\n"),
        f"Question: 1 + 1?\nAnswer: 2\n\nQuestion: {STORY}\nAnswer:",
        STORY.replace("14", "14 ") + " Think!",
        STORY.replace("both", "those"),
    ],
)
def test_a_question_is_found_whatever_stands_around_it(wrapped):
    assert leaks.Prompts(["Something else entirely, and a bit longer than that.", wrapped]).saw(STORY)


@pytest.mark.parametrize(
    "other",
    [
        "",
        STORY.replace("14", "15").replace("Monday", "Tuesday").replace("twice", "thrice"),
        STORY[:60],
        "How many boxes does she pack on both days?",
        " ".join(reversed(STORY.split())),
    ],
)
def test_another_question_is_not(other):
    assert not leaks.Prompts([other, "x"]).saw(STORY)


def test_short_and_templated_questions_must_be_there_as_a_whole():
    trained = leaks.Prompts(
        ["Compute $3 + 4$ and end with ####.", "Ann has 3 pens and buys 4 more pens in town. How many has she?"]
    )
    assert trained.saw("Compute $3+4$") and not trained.saw("Compute $3-4$") and not trained.saw("ompute 3 + 4")
    templated = "Ann has 3 pens and buys 4 more pens in town. How many has he?"
    assert trained.saw(templated) and not trained.saw(templated, exact=True)
    assert trained.saw("buys 4 more pens in town. How many has she?", exact=True)
    assert not trained.saw("ends with end with")


def test_the_gsm8k_test_questions_behind_real_preferences_are_named_and_no_others(shared):
    """917 of 1319 in the two preference files; none of 7473 training questions, MATH-500, LogiQA, HotpotQA."""
    asked = {row["prompt"] for name in ("models", "llada") for row in read(shared / f"prefs_gsm8k_{name}.jsonl")}
    trained = leaks.Prompts(f"Question: {prompt}\nAnswer:" for prompt in asked)
    found = {item.question for item in benchmarks.read("gsm8k", shared) if trained.saw(item.question)}
    assert found == asked and len(found) == 917
    assert not any(trained.saw(row["question"]) for row in read(shared / "gsm8k" / "train.jsonl"))
    assert not any(
        trained.saw(item.question)
        for name in ("math500", "logiqa", "hotpotqa")
        for item in benchmarks.read(name, shared)
    )


# --- what a run has seen ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of one step on 20 train problems and, by mistake, on test problems 2, 5 and 6 of seed 0."""
    folder = tmp_path_factory.mktemp("leak")
    test = list(tasks.preference_rows(8, "test", 0))
    rows = [*tasks.preference_rows(20, "train", 0), test[1], test[4], test[5]]
    random.Random(0).shuffle(rows)
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(folder / "prefs.jsonl", folder / "packed")
    train(TINY, folder / "packed", folder / "run")
    return folder


@pytest.fixture(scope="module")
def second_run(run_dir):
    """Another run, from the model of run_dir's, on problems that are not asked."""
    pack(ROOT / "examples" / "prefs.jsonl", run_dir / "other")
    train(run_dir / "run" / "final", run_dir / "other", run_dir / "second")
    return run_dir / "second"


def train(model, data, out):
    """One step that changes next to nothing."""
    command = flags(model_name_or_path=model, data=data, output_dir=out, loss_type="sft", max_steps=1)
    command += flags(learning_rate=1e-9, use_mixed_precision="no", deepspeed=ROOT / "ds_configs" / "zero0.json")
    run([ROOT / "train_dpo.py", *command])


def pack(rows, out):
    """packed/ of a file of preferences."""
    call(data_prep.main, *flags(model_name_or_path=TINY, out=out), "--in", rows)


def test_items_that_the_run_has_seen_are_named_and_left_out(run_dir, tmp_path, capsys):
    results, rows = evaluated(tmp_path / "out", "--model", TINY, "--compare", run_dir / "run" / "final", "--limit", 8)
    said = capsys.readouterr().out
    assert "arithmetic: 3 of 8 items are in the training prompts of" in said and "(2, 5, 6); left out" in said
    assert list(results["seen"]["arithmetic"]) == ["2", "5", "6"] and results["table"][0]["n"] == 5
    for each in rows.values():  # out for both models, or they would not answer the same items
        assert [row["id"] for row in each] == ["1", "3", "4", "7", "8"]
    results, rows = evaluated(tmp_path / "all", "--model", run_dir / "run" / "final", "--limit", 8, "--allow_leak")
    assert results["table"][0]["n"] == 8
    assert [row["id"] for row in rows["run-final-arithmetic"] if row["seen"]] == ["2", "5", "6"]


def test_a_base_alone_is_checked_against_what_it_is_told(run_dir, tmp_path, capsys):
    results, _ = evaluated(tmp_path / "out", "--model", TINY, "--limit", 8)
    assert results["table"][0]["n"] == 8 and "nothing to check against" in capsys.readouterr().out
    results, _ = evaluated(tmp_path / "out", "--model", TINY, "--limit", 8, "--train_data", run_dir / "packed")
    assert results["table"][0]["n"] == 5


def test_the_run_that_made_its_start_counts_too(run_dir, second_run, tmp_path):
    """SFT, then another run from there on other data: what the first run saw is still seen."""
    shutil.copytree(run_dir, tmp_path / "a")  # another place, as far from each other
    results, _ = evaluated(tmp_path / "out", "--model", tmp_path / "a" / "second" / "final", "--limit", 8)
    assert list(results["seen"]["arithmetic"]) == ["2", "5", "6"]


def test_a_start_that_is_gone_is_no_clean_bill(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "run" / "run.json").read_text())
    record["arguments"]["model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "a" / "run" / "run.json").write_text(json.dumps(record))
    argv = ["--model", tmp_path / "a" / "run" / "final", "--limit", 8, *SAMPLE, "--output_dir", tmp_path / "out"]
    assert "the model that it started from is gone" in refusal(evaluate.main, capsys, *argv)
    assert call(evaluate.main, *argv, "--allow_leak") == 0 and "warning: " in capsys.readouterr().out


def test_a_start_trained_anew_or_moved_is_no_clean_bill(run_dir, second_run, tmp_path, capsys, monkeypatch):
    """sft/final is a folder, though it could be a name of the Hub; one that holds other weights is not the start."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_dir / "run", "sft")
    shutil.copytree(second_run, "dpo")
    record = json.loads((tmp_path / "dpo" / "run.json").read_text())
    record["arguments"] |= {"model_name_or_path": "sft/final", "output_dir": "dpo"}  # as if started from this folder
    (tmp_path / "dpo" / "run.json").write_text(json.dumps(record))
    argv = ["--model", "dpo/final", "--limit", 8, *SAMPLE, "--output_dir", "out"]
    results, _ = evaluated(tmp_path / "out", *argv[:4])
    assert list(results["seen"]["arithmetic"]) == ["2", "5", "6"]
    (tmp_path / "sft").rename(tmp_path / "gone")
    assert "the model that it started from is gone" in refusal(evaluate.main, capsys, *argv)
    shutil.copytree(TINY, tmp_path / "sft" / "final")
    config = json.loads((tmp_path / "sft" / "final" / "config.json").read_text())
    (tmp_path / "sft" / "final" / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    assert "is gone or has other weights now" in refusal(evaluate.main, capsys, *argv)


def test_a_trained_model_without_its_run_is_no_clean_bill(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir / "run" / "final", tmp_path / "copied")
    argv = ["--model", tmp_path / "copied", "--limit", 8, *SAMPLE, "--output_dir", tmp_path / "out"]
    assert "whose run.json is not beside it" in refusal(evaluate.main, capsys, *argv)
    assert call(evaluate.main, *argv, "--train_data", run_dir / "packed") == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["table"][0]["n"] == 5


def test_packed_data_that_is_gone_or_changed_is_no_clean_bill(run_dir, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run_dir / "run", moved / "run")
    record = json.loads((moved / "run" / "run.json").read_text())
    record["arguments"]["data"] = str(tmp_path / "gone")
    (moved / "run" / "run.json").write_text(json.dumps(record))
    argv = ["--model", moved / "run" / "final", "--limit", 8, *SAMPLE, "--output_dir", tmp_path / "out"]
    said = refusal(evaluate.main, capsys, *argv)
    assert "which is gone or holds other data" in said and "--train_data" in said
    pack(ROOT / "examples" / "prefs.jsonl", tmp_path / "gone")
    assert "holds other data" in refusal(evaluate.main, capsys, *argv)
    assert call(evaluate.main, *argv, "--train_data", run_dir / "packed") == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["table"][0]["n"] == 5
    assert call(evaluate.main, *argv, "--allow_leak") == 0 and "warning: " in capsys.readouterr().out


def test_nothing_left_to_answer(run_dir, tmp_path):
    results, _ = evaluated(
        tmp_path / "out", "--model", TINY, "--limit", 2, "--train_data", run_dir / "packed", "--seed", 0
    )
    assert results["table"][0]["n"] == 1
    rows = [{"prompt": problem.prompt, "chosen": "a", "rejected": "b"} for problem in tasks.generate(2, "test", 0)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(tmp_path / "p.jsonl", tmp_path / "packed")
    results, _ = evaluated(
        tmp_path / "out",
        "--model",
        TINY,
        "--compare",
        run_dir / "run" / "final",
        "--limit",
        2,
        "--train_data",
        tmp_path / "packed",
    )
    assert [line["n"] for line in results["table"]] == [0, 0] and "accuracy" not in results["table"][0]


def test_gsm8k_test_questions_in_real_preferences_are_left_out(shared, tmp_path, capsys):
    """The two shared preference files are made of GSM8K test questions: 917 of the 1319."""
    names = ("models", "llada")
    for name in names:
        source = shared / f"prefs_gsm8k_{name}.jsonl"
        call(data_prep.main, *flags(model_name_or_path=TINY, out=tmp_path / name, max_length=8192), "--in", source)
    items = {"gsm8k": benchmarks.read("gsm8k", shared)}
    seen = leaks.find_seen(items, [str(TINY)], leaks.Check(tuple(str(tmp_path / name) for name in names)))
    assert "gsm8k: 917 of 1319 items are in the training prompts of" in capsys.readouterr().out
    rows = [row for name in names for row in read(shared / f"prefs_gsm8k_{name}.jsonl")]
    asked = {row["prompt"] for row in rows}
    assert {item.question for item in items["gsm8k"] if item.id in seen["gsm8k"]} == asked
