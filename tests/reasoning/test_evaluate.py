"""Tests of evaluate.py: items, verdicts and the table against sums of this file's own; stopped jobs; refusals.

bash tests/run.sh tests/reasoning/test_evaluate.py
"""

import json
from itertools import combinations, groupby

import pytest
from answered import SAMPLE, TINY, evaluated, read
from small import ROOT, call, flags, refusal

import evaluate
import generate
import make_prefs
from config import SampleArguments
from reasoning import answers, comparison, responses, sampler, tasks

# --- the embedded tasks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tiny_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return evaluated(
        out, "--model", TINY, "--compare", tiny_dir, "--tasks", "arithmetic,ordering", "--limit", 24, "--seed", 3
    )


def test_table_is_what_the_rows_say(compared, tiny_dir):
    results, rows = compared
    names = comparison.labels([str(TINY), str(tiny_dir)])
    first, second = names.values()
    assert [(line["task"], line["model"]) for line in results["table"]] == [
        ("arithmetic", first),
        ("arithmetic", second),
        ("ordering", first),
        ("ordering", second),
    ]
    for line in results["table"]:
        own = rows[f"{line['model']}-{line['task']}"]
        assert line["n"] == len(own) == 24 and line["accuracy"] == sum(row["correct"] is True for row in own) / 24
        assert line["unread"] == sum(row["correct"] is None for row in own) / 24
        assert line["ci95"][0] <= line["accuracy"] <= line["ci95"][1]
        assert line["tokens"] == sum(row["tokens"] for row in own) / 24
        test = line.get("first_model_against_it")
        assert (test is None) == (line["model"] == first)
        if test:
            pairs = list(zip(rows[f"{first}-{line['task']}"], own, strict=True))
            pairs = [(a["correct"] is True, b["correct"] is True) for a, b in pairs]
            assert test["won"] == sum(a > b for a, b in pairs)
            assert test["lost"] == sum(a < b for a, b in pairs)
            assert test["difference"] == (test["won"] - test["lost"]) / 24
    assert results["table"][0]["accuracy"] > 0.1  # the embedded model solves some, or nothing above means much
    assert results["models"][first]["fingerprint"] != results["models"][second]["fingerprint"]
    assert results["seen"] == {"arithmetic": {}, "ordering": {}}


def test_sudoku_is_d1s_file_where_there_is_a_folder_else_held_out_problems(tmp_path):
    (tmp_path / "4x4_test_sudoku.csv").write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n")
    argv = ["--model", "m", "--tasks", "sudoku", "--limit", "3"]
    of_the_file, drawn = (
        evaluate.read_items("sudoku", None, None, evaluate.read_arguments(each)[0], seed=5)
        for each in ([*argv, "--data_dir", str(tmp_path)], argv)
    )
    assert [item.answer for item in of_the_file] == ["3102 2000 0210 0320, such as 3142 2431 4213 1324"]
    assert [item.prompt for item in drawn] == [problem.prompt for problem in tasks.generate(3, "test", 5, ("sudoku",))]
    assert {item.kind for item in [*of_the_file, *drawn]} == {"sudoku"}


def test_rows_are_the_items_and_what_generate_says(compared, tmp_path):
    """The same problems and the same words as generate.py --task with that seed; held-out ones, verified."""
    _, rows = compared
    problems = tasks.generate(24, "test", 3)
    out = tmp_path / "out.jsonl"
    call(generate.main, *flags(model=TINY, task="arithmetic", num=24, seed=3, out=out), *SAMPLE)
    for problem, row, said in zip(problems, rows["examples-tiny-arithmetic"], read(out), strict=True):
        assert row["prompt"] == problem.prompt == said["prompt"] and row["answer"] == problem.answer
        assert row["response"] == said["response"] and row["correct"] is tasks.verify(problem, row["response"])
        assert row["extracted"] == answers.read("number", row["response"]) and row["seen"] is False


def test_noise_of_an_item_does_not_depend_on_the_others(tmp_path):
    some, many = (
        evaluated(tmp_path / str(limit), "--model", TINY, "--limit", limit, "--temperature", 1)[1][
            "examples-tiny-arithmetic"
        ]
        for limit in (5, 9)
    )
    assert some == many[:5] and len({row["response"] for row in many}) > 3


def test_a_stopped_evaluation_goes_on(tmp_path, monkeypatch):
    """Killed with three responses in flight, after others had ended: those are kept, none is lost or made twice."""
    respond, asked, kept = sampler.respond, [], []

    def counted(model, tokenizer, prompts, sample, **options):
        asked.append(len(prompts))
        return respond(model, tokenizer, prompts, sample, **options)

    def killed(model, tokenizer, prompts, sample, *, finished, **options):
        def some(replies):
            if len(kept) >= 2:
                raise KeyboardInterrupt
            kept.extend(replies)
            finished(replies)

        return respond(model, tokenizer, prompts, sample, finished=some, **options)

    argv = ["--model", TINY, "--temperature", 1, "--k", 2, "--batch_size", 3]
    monkeypatch.setattr(sampler, "respond", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "out", *argv, "--limit", 4)
    monkeypatch.setattr(sampler, "respond", counted)
    _, rows = evaluated(tmp_path / "out", *argv, "--limit", 4)
    assert 2 <= len(kept) < 8 and asked == [8 - len(kept)]
    _, more = evaluated(tmp_path / "out", *argv, "--limit", 6)
    assert asked[1:] == [4] and more["examples-tiny-arithmetic"][:8] == rows["examples-tiny-arithmetic"]
    [stored] = (tmp_path / "out" / "samples").glob("*.jsonl")
    numbers = [(line["number"], line["sample"]) for line in read(stored)[1:]]
    assert sorted(numbers) == [(number, j) for number in range(6) for j in range(2)]
    monkeypatch.setattr(sampler, "load", None)  # nothing to do, no model to load
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


def test_an_earlier_commands_responses_are_not_taken_for_this_ones(tmp_path):
    """Nor is a file of the user's touched."""
    (tmp_path / "mine.jsonl").write_text("{}\n")
    evaluated(tmp_path, "--model", TINY, "--tasks", "arithmetic,ordering", "--limit", 2)
    _, rows = evaluated(tmp_path, "--model", TINY, "--tasks", "ordering", "--limit", 3)
    assert set(rows) == {"examples-tiny-ordering", "mine"} and len(rows["examples-tiny-ordering"]) == 3


# --- several responses per item -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(tiny_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("sampled")
    argv = ["--model", TINY, "--compare", tiny_dir, "--limit", 8, "--k", 4, "--temperature", 1.5, "--steps", 6]
    return evaluated(out, *argv)


def test_pass_at_k_and_majority_are_what_the_rows_say(sampled):
    """pass@k as the mean over all subsets of k samples; the vote by the number that each sample was read as."""
    results, rows = sampled
    line, other = results["table"]
    own = [list(group) for _, group in groupby(rows["examples-tiny-arithmetic"], key=lambda row: row["id"])]
    assert len(own) == line["n"] == 8 and all([row["sample"] for row in item] == [0, 1, 2, 3] for item in own)
    assert len({row["response"] for item in own for row in item}) > 6
    right = [[row["correct"] is True for row in item] for item in own]
    for k in (1, 2, 4):
        found = [any(subset) for item in right for subset in combinations(item, k)]
        assert line["pass_at"][str(k)]["value"] == pytest.approx(sum(found) / len(found))
    assert line["accuracy"] == line["pass_at"]["1"]["value"] > 0.1 and line["samples"] == 4
    assert line["accuracy"] < line["pass_at"]["4"]["value"]
    solved = []
    for item in own:
        said = [row["extracted"] for row in item if row["extracted"] is not None]
        most = max(said, key=lambda answer: (said.count(answer), -said.index(answer)), default=None)
        solved.append(most is not None and answers.grade("number", item[0]["answer"], f"#### {most}")["correct"])
    assert line["majority"]["value"] == sum(solved) / 8
    test = other["first_model_against_it"]  # the other model solves nothing
    assert (test["won"], test["lost"]) == (sum(solved), 0) and test["pass@1"]["value"] == line["accuracy"]


def test_a_line_names_base_adapter_and_sampler(sampled, tmp_path):
    """Of an adapter that other software wrote, with no weights to load: the table is what is tested."""
    line, _ = sampled[0]["table"]
    assert (line["base"], line["adapter"]) == (str(TINY), None)
    said = "--use_mixed_precision no --gen_length 24 --steps 6 --block_length 8 --temperature 1.5"
    assert line["sampler"] == said
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(TINY)}))
    task = responses.Task("t", None, None, SampleArguments(gen_length=8, threshold=0.9, device="cpu"), [])
    about = responses.about(task, str(tmp_path))
    assert (about["base"], about["adapter"]) == (str(TINY), str(tmp_path))
    assert about["sampler"] == "--gen_length 8 --block_length 8 --threshold 0.9"


@pytest.fixture
def asked(monkeypatch):
    """The texts that the sampler is asked to go on from, in order."""
    texts, respond = [], sampler.respond

    def spied(model, tokenizer, prompts, sample, **options):
        texts.extend(map(tokenizer.decode, prompts))
        return respond(model, tokenizer, prompts, sample, **options)

    monkeypatch.setattr(sampler, "respond", spied)
    return texts


def test_gsm8k_by_a_protocol(tmp_path, asked):
    """Asked as d1 does, on a model without a chat template: its opening precedes the response, its reader has a say."""
    (tmp_path / "test.jsonl").write_text('{"question": "How many are 7 and 5?", "answer": "#### 12"}\n')
    argv = ["--model", TINY, "--tasks", "gsm8k", "--protocol", "d1", "--data_dir", tmp_path]
    results, rows = evaluated(tmp_path / "out", *argv)
    [line], [row] = results["table"], rows["examples-tiny-gsm8k"]
    assert line["protocol"] == "d1" and line["by_protocol"] == row["by_protocol"] == 0
    assert "--gen_length 24 --steps 12 --block_length 8" in line["sampler"] and "78.2" in line["published"]
    assert len(asked) == 1 and asked[0].endswith("<reasoning>") and "How many are 7 and 5?" in asked[0]


def test_responses_of_a_protocol_are_not_taken_for_others(tmp_path, asked):
    """The same prompt with the same flags, once with the protocol's opening."""
    argv = ["--model", TINY, "--tasks", "countdown", "--limit", 1, "--steps", 12]
    for more in ([], ["--protocol", "d1"], []):
        evaluated(tmp_path, *argv, *more)
    assert len(asked) == 2 and asked[1] == asked[0] + "<reasoning>"


# --- problems of one's own ---------------------------------------------------------------------------------


def test_own_problems(tmp_path):
    """Beside a task of ours: the embedded problems from a file, in three forms, get the same words and verdicts."""
    drawn = tasks.generate(12, "test", 3)
    rows = [{"prompt": each.prompt, "answer": int(each.answer)} for each in drawn[:4]]
    rows += [{"question": each.prompt, "answer": f"so\n#### {each.answer}"} for each in drawn[4:8]]
    rows += [{"problem": each.prompt, "answer": rf"\boxed{{{each.answer}}}", "id": 1} for each in drawn[8:]]
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", TINY, "--in", source, "--seed", 3]
    results, rows = evaluated(tmp_path / "out", *argv, "--tasks", "arithmetic", "--limit", 12)
    assert [line["task"] for line in results["table"]] == ["arithmetic", "mine"]
    own, ours = rows["examples-tiny-mine"], rows["examples-tiny-arithmetic"]
    for name in ("prompt", "response", "answer", "extracted", "correct"):
        assert [row[name] for row in own] == [row[name] for row in ours]
    assert {True, False} <= {row["correct"] for row in own}
    results, rows = evaluated(tmp_path / "alone", *argv)
    assert [(line["task"], line["n"]) for line in results["table"]] == [("mine", 12)]
    assert rows["examples-tiny-mine"] == own


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
        (["--k", 0], "--k is 0"),
        (["--k", 4], "--temperature 0 gives the same response 4 times"),
        (["--k", 4, "--temperature", 1, "--tasks", "lm_eval:gsm8k"], "are asked once"),
        (["--protocol", "llada"], "says nothing of arithmetic; it has gsm8k, math500"),
        (["--protocol", "d1", "--in", "a/x.jsonl"], "says nothing of x"),
        (["--in", "no/file.jsonl"], "no/file.jsonl"),
        (["--columns", "prompt=q"], "give --in FILE"),
        (["--in", "a/x.jsonl", "b/x.jsonl"], "there is another task x"),
        (["--tasks", "gsm8k", "--in", "gsm8k.jsonl"], "there is another task gsm8k"),
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
