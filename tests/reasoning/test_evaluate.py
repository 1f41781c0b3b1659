"""Tests of evaluate.py: items, verdicts and the table against sums of this file's own; what a run has seen; refusals.

.venv/bin/python -m pytest -q tests/test_evaluate.py
"""

import json
import math
import random
import shutil

import pytest
from small import ROOT, call, refusal, run

import data_prep
import evaluate
import generate
import make_prefs
from reasoning import sampler, tasks

TINY = ROOT / "examples" / "tiny"
SAMPLE = ["--use_mixed_precision", "no", "--device", "cpu", "--gen_length", 24, "--block_length", 8]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluated(out, *argv):
    """(results.json, {file stem: rows}) of a call."""
    assert call(evaluate.main, *argv, *SAMPLE, "--output_dir", out) == 0
    return json.loads((out / "results.json").read_text()), {path.stem: read(path) for path in out.glob("*.jsonl")}


# --- sums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("won, lost", [(0, 0), (1, 0), (5, 0), (0, 5), (4, 9), (9, 4), (7, 7), (30, 12)])
def test_mcnemar_counts_all_outcomes(won, lost):
    """Two-sided exact: the share of all 2^n outcomes of n fair coins that are at most as likely as this one."""
    n = won + lost
    likely = [math.comb(n, k) for k in range(n + 1)]
    assert evaluate.mcnemar(won, lost) == pytest.approx(sum(each for each in likely if each <= likely[won]) / 2**n)


@pytest.mark.parametrize(
    "models, names",
    [
        (["examples/tiny"], ["examples-tiny"]),
        (["runs/a/final", "runs/b/final"], ["a-final", "b-final"]),
        (["x/a/final", "y/a/final", "b/tiny"], ["x-a-final", "y-a-final", "b-tiny"]),
        (["x/a-b/c", "x/a/b-c"], ["x-a-b-c-1", "x-a-b-c-2"]),
        (["GSAI-ML/LLaDA-8B-Base"], ["GSAI-ML-LLaDA-8B-Base"]),
    ],
)
def test_labels(models, names):
    assert list(evaluate.labels(models).values()) == names


# --- the embedded tasks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tiny_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return evaluated(
        out, "--model", TINY, "--compare", tiny_dir, "--tasks", "arithmetic,ordering", "--limit", 24, "--seed", 3
    )


def test_table_is_what_the_rows_say(compared, tiny_dir):
    results, rows = compared
    names = evaluate.labels([str(TINY), str(tiny_dir)])
    first, second = names.values()
    assert [(line["task"], line["model"]) for line in results["table"]] == [
        ("arithmetic", first),
        ("arithmetic", second),
        ("ordering", first),
        ("ordering", second),
    ]
    for line in results["table"]:
        own = rows[f"{line['model']}-{line['task']}"]
        assert line["n"] == len(own) == 24 and line["accuracy"] == sum(row["correct"] for row in own) / 24
        assert line["ci95"][0] <= line["accuracy"] <= line["ci95"][1]
        assert line["tokens"] == sum(row["tokens"] for row in own) / 24
        test = line.get("first_model_against_it")
        assert (test is None) == (line["model"] == first)
        if test:
            pairs = list(zip(rows[f"{first}-{line['task']}"], own, strict=True))
            assert test["won"] == sum(a["correct"] > b["correct"] for a, b in pairs)
            assert test["lost"] == sum(a["correct"] < b["correct"] for a, b in pairs)
            assert test["difference"] == (test["won"] - test["lost"]) / 24
    assert results["table"][0]["accuracy"] > 0.1  # the embedded model solves some, or nothing above means much
    assert results["models"][first]["fingerprint"] != results["models"][second]["fingerprint"]
    assert results["seen"] == {"arithmetic": {}, "ordering": {}}


def test_rows_are_the_items_and_what_generate_says(compared, tmp_path):
    """The same problems and the same words as generate.py --task with that seed; held-out ones, verified."""
    _, rows = compared
    problems = tasks.generate(24, "test", 3)
    call(
        generate.main,
        "--model",
        TINY,
        "--task",
        "arithmetic",
        "--num",
        24,
        "--seed",
        3,
        *SAMPLE,
        "--out",
        tmp_path / "out.jsonl",
    )
    for problem, row, said in zip(
        problems, rows["examples-tiny-arithmetic"], read(tmp_path / "out.jsonl"), strict=True
    ):
        assert row["prompt"] == problem.prompt == said["prompt"] and row["answer"] == problem.answer
        assert row["response"] == said["response"] and row["correct"] == tasks.verify(problem, row["response"])
        assert row["extracted"] == tasks.extract_answer(row["response"]) and row["seen"] is False


def test_noise_of_an_item_does_not_depend_on_the_others(tmp_path):
    some, many = (
        evaluated(tmp_path / str(limit), "--model", TINY, "--limit", limit, "--temperature", 1)[1][
            "examples-tiny-arithmetic"
        ]
        for limit in (5, 9)
    )
    assert some == many[:5] and len({row["response"] for row in many}) > 3


def test_a_stopped_evaluation_goes_on(tmp_path, monkeypatch):
    """Killed in the third batch of four: the first two are kept; more items and another model cost what they are."""
    respond, asked = sampler.respond, []

    def counted(model, tokenizer, prompts, sample, *, keys, finished):
        asked.append(len(prompts))
        return respond(model, tokenizer, prompts, sample, keys=keys, finished=finished)

    def killed(model, tokenizer, prompts, sample, *, keys, finished):
        batches = []

        def two(replies):
            if len(batches) == 2:
                raise KeyboardInterrupt
            batches.append(replies)
            finished(replies)

        return respond(model, tokenizer, prompts, sample, keys=keys, finished=two)

    argv = ["--model", TINY, "--temperature", 1, "--batch_size", 1]
    monkeypatch.setattr(generate, "respond", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "out", *argv, "--limit", 4)
    monkeypatch.setattr(generate, "respond", counted)
    _, rows = evaluated(tmp_path / "out", *argv, "--limit", 4)
    assert asked == [2]
    _, more = evaluated(tmp_path / "out", *argv, "--limit", 6)
    assert asked == [2, 2] and more["examples-tiny-arithmetic"][:4] == rows["examples-tiny-arithmetic"]
    monkeypatch.setattr(generate, "load", None)  # nothing to do, no model to load
    assert evaluated(tmp_path / "out", *argv, "--limit", 6)[1] == more
    monkeypatch.undo()
    assert evaluated(tmp_path / "anew", *argv, "--limit", 6)[1] == more


def test_a_judge_can_take_it_from_here(compared, tmp_path):
    """Responses of both models, judged: pairs by make_prefs.py --strategy label."""
    _, rows = compared
    judged = tmp_path / "judged.jsonl"
    judged.write_text(
        "".join(json.dumps({**row, "score": len(row["response"])}) + "\n" for each in rows.values() for row in each)
    )
    call(make_prefs.main, "--strategy", "label", "--in", judged, "--out", tmp_path / "prefs.jsonl")
    made = read(tmp_path / "prefs.jsonl")
    assert made and all(len(row["chosen"]) > len(row["rejected"]) for row in made)


# --- the leak check ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of one step on 20 train problems and, by mistake, on test problems 2, 5 and 6 of seed 0."""
    folder = tmp_path_factory.mktemp("leak")
    test = list(tasks.preference_rows(8, "test", 0))
    rows = [*tasks.preference_rows(20, "train", 0), test[1], test[4], test[5]]
    random.Random(0).shuffle(rows)
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(data_prep.main, "--in", folder / "prefs.jsonl", "--out", folder / "packed", "--model_name_or_path", TINY)
    train(TINY, folder / "packed", folder / "run")
    return folder


def train(model, data, out):
    """One step that changes next to nothing."""
    run(
        [
            ROOT / "train_dpo.py",
            "--model_name_or_path",
            model,
            "--data",
            data,
            "--output_dir",
            out,
            "--loss_type",
            "sft",
            "--max_steps",
            1,
            "--learning_rate",
            1e-9,
            "--use_mixed_precision",
            "no",
            "--deepspeed",
            ROOT / "ds_configs" / "zero0.json",
        ]
    )


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


def test_the_run_that_made_its_start_counts_too(run_dir, tmp_path):
    """SFT, then another run from there on other data: what the first run saw is still seen."""
    shutil.copytree(run_dir, tmp_path / "a")  # another place, as far from each other
    call(
        data_prep.main,
        "--in",
        ROOT / "examples" / "prefs.jsonl",
        "--out",
        tmp_path / "other",
        "--model_name_or_path",
        TINY,
    )
    train(tmp_path / "a" / "run" / "final", tmp_path / "other", tmp_path / "b")
    results, _ = evaluated(tmp_path / "out", "--model", tmp_path / "b" / "final", "--limit", 8)
    assert list(results["seen"]["arithmetic"]) == ["2", "5", "6"]


def test_a_start_that_is_gone_is_no_clean_bill(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "run" / "run.json").read_text())
    record["arguments"]["model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "a" / "run" / "run.json").write_text(json.dumps(record))
    argv = ["--model", tmp_path / "a" / "run" / "final", "--limit", 8, *SAMPLE, "--output_dir", tmp_path / "out"]
    assert "the model that it started from is gone" in refusal(evaluate.main, capsys, *argv)
    assert call(evaluate.main, *argv, "--allow_leak") == 0 and "warning: " in capsys.readouterr().out


def test_a_start_trained_anew_or_moved_is_no_clean_bill(run_dir, tmp_path, capsys, monkeypatch):
    """sft/final is a folder, though it could be a name of the hub; one of that name that holds other weights is not the start."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_dir / "packed", "packed")
    train(TINY, tmp_path / "packed", tmp_path / "sft")
    call(data_prep.main, "--in", ROOT / "examples" / "prefs.jsonl", "--out", "other", "--model_name_or_path", TINY)
    train(tmp_path / "sft" / "final", tmp_path / "other", tmp_path / "dpo")
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


def test_an_earlier_commands_responses_are_not_taken_for_this_ones(tmp_path):
    """Nor is a file of the user's touched."""
    (tmp_path / "mine.jsonl").write_text("{}\n")
    evaluated(tmp_path, "--model", TINY, "--tasks", "arithmetic,ordering", "--limit", 2)
    _, rows = evaluated(tmp_path, "--model", TINY, "--tasks", "ordering", "--limit", 3)
    assert set(rows) == {"examples-tiny-ordering", "mine"} and len(rows["examples-tiny-ordering"]) == 3


def test_packed_data_that_is_gone_or_changed_is_no_clean_bill(run_dir, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run_dir / "run", moved / "run")
    record = json.loads((moved / "run" / "run.json").read_text())
    record["arguments"]["data"] = str(tmp_path / "gone")
    (moved / "run" / "run.json").write_text(json.dumps(record))
    argv = ["--model", moved / "run" / "final", "--limit", 8, *SAMPLE, "--output_dir", tmp_path / "out"]
    said = refusal(evaluate.main, capsys, *argv)
    assert "which is gone or holds other data" in said and "--train_data" in said
    call(
        data_prep.main,
        "--in",
        ROOT / "examples" / "prefs.jsonl",
        "--out",
        tmp_path / "gone",
        "--model_name_or_path",
        TINY,
    )
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
    call(data_prep.main, "--in", tmp_path / "p.jsonl", "--out", tmp_path / "packed", "--model_name_or_path", TINY)
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
    for name in ("models", "llada"):
        call(
            data_prep.main,
            "--in",
            shared / f"prefs_gsm8k_{name}.jsonl",
            "--out",
            tmp_path / name,
            "--model_name_or_path",
            TINY,
            "--max_length",
            8192,
        )
    args = evaluate.EvaluateArguments(
        tasks="gsm8k", data_dir=str(shared), train_data=[str(tmp_path / name) for name in ("models", "llada")]
    )
    items = {"gsm8k": evaluate.read_items("gsm8k", None, args, 0)}
    seen = evaluate.find_seen(items, [str(TINY)], args, False)
    assert "gsm8k: 917 of 1319 items are in the training prompts of" in capsys.readouterr().out
    asked = {
        json.loads(line)["prompt"]
        for name in ("models", "llada")
        for line in (shared / f"prefs_gsm8k_{name}.jsonl").read_text().splitlines()
    }
    assert {item.question for item in items["gsm8k"] if item.id in seen["gsm8k"]} == asked


# --- the benchmarks ---------------------------------------------------------------------------------------


def test_benchmarks_from_their_files(shared, tmp_path):
    """All four, the first items; a tiny model knows nothing of them, but what it says is graded."""
    names = ["gsm8k", "logiqa", "hotpotqa"]
    try:
        import math_verify  # noqa: F401

        names.append("math500")
    except ImportError:
        pass
    results, rows = evaluated(tmp_path, "--model", TINY, "--tasks", ",".join(names), "--limit", 3, "--data_dir", shared)
    assert [(line["task"], line["n"]) for line in results["table"]] == [(name, 3) for name in names]
    assert all(
        {"prompt", "response", "answer", "extracted", "correct", "model"} <= set(row)
        for each in rows.values()
        for row in each
    )
    assert all("f1" in row for row in rows["examples-tiny-hotpotqa"]) and "f1" in results["table"][2]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--tasks", "sums"], "no task 'sums'"),
        (["--limit", 0], "--limit is 0"),
        (["--compare", TINY], "is there twice"),
        (["--compare", "nowhere/at-all"], "nowhere/at-all"),
        (["--tasks", "gsm8k", "--data_dir", "no/folder"], "holds no file of gsm8k"),
        (["--block_length", 7], "--block_length"),
        (["--output_dir", ROOT / "README.md" / "sub"], "cannot be written to"),
        (["--template", "chat"], "--template chat"),
        (["--train_data", "no/packed"], "no/packed"),
    ],
)
def test_refusals(argv, words, tmp_path, capsys):
    said = refusal(evaluate.main, capsys, "--model", TINY, *SAMPLE, "--output_dir", tmp_path / "out", *argv)
    assert words in said and not (tmp_path / "out").exists()


def test_math_needs_its_library_and_says_so_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    said = refusal(
        evaluate.main, capsys, "--model", TINY, "--tasks", "math500", *SAMPLE, "--output_dir", tmp_path / "out"
    )
    assert "pip install -r requirements-eval.txt" in said
