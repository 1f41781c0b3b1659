"""Tests of examples/reason.sh: its plan against plan.py's, its problems, what it refuses; the table of several seeds
(examples/improve.py); and the whole loop, killed.

bash tests/run.sh tests/test_reason.py
"""

import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from small import ROOT, copy_of_the_repository, refusal, shell_environment

sys.path.insert(0, str(ROOT / "examples"))
import improve
import reason
import reason_problems
import reason_results

import plan
from reasoning import tasks

CARD = ["--gpu_gib", "16", "--host_gib", "29.8"]
LLADA = ["llada_8b_qlora_4080", "--model", str(ROOT / "tests/configs/llada_8b"), *CARD]
HEADER = json.dumps({"model": "m", "k": 4})


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def printed(main, capsys, *words):
    """What a command prints; its exit code must be 0."""
    capsys.readouterr()
    assert main([*words]) == 0
    return capsys.readouterr().out


def hours_of(said):
    """{words of a stage: hours} of the plan."""
    return {words.strip(): float(hours) for words, hours in re.findall(r"^  (\S.*?) +(\d+\.\d\d) +\d+ ", said, re.M)}


# --- the plan ---------------------------------------------------------------------------------------------


def test_hours_are_those_of_plan_py(capsys):
    """The plan prints commands of plan.py: each says the same hours, to the digits that it prints."""
    said = printed(reason.main, capsys, *LLADA, "--hours", "10", "--dry_run")
    planned = list(hours_of(said).values())
    commands = [shlex.split(line)[2:] for line in said.splitlines() if line.startswith("  python plan.py ")]
    assert len(planned) == len(commands) == 6
    for hours, words in zip(planned, commands):
        told = printed(plan.main, capsys, *words)
        if "--for" in words:
            [theirs] = re.findall(r"planned: ([\d.]+) h", told)
            assert float(theirs) == pytest.approx(hours, abs=0.011)
        else:
            theirs = re.findall(r"([\d.]+) h of (?:reference scores|training)", told)
            assert sum(map(float, theirs)) == pytest.approx(hours, abs=0.11)  # one decimal each
    assert 9 < float(re.search(r"in all, at most +([\d.]+)", said)[1]) <= 10


@pytest.mark.parametrize("preset, folder", [("sdar_4b_lora_4080", "sdar_4b"), ("qwen_0.5b_4080", "qwen_0.5b")])
def test_presets_are_planned_from_config_json_alone(preset, folder, capsys):
    words = [preset, "--model", f"tests/configs/{folder}", *CARD, "--hours", "8", "--rounds", "2", "--dry_run"]
    said = printed(reason.main, capsys, *words)
    assert float(re.search(r"in all, at most +([\d.]+)", said)[1]) <= 8
    assert said.count("FITS") == 4 and "DOES NOT FIT" not in said


def test_a_model_without_a_preset_is_trained_as_it_fits(capsys):
    """LLaDA-8B on 16 GiB: in 4 bits, as neither all of its weights nor 16 bits fit."""
    said = printed(reason.main, capsys, str(ROOT / "tests/configs/llada_8b"), *CARD, "--dry_run", "--method", "dpo")
    assert "--load_in_4bit true" in said and "no preset" in said and "rft" not in said


def test_refusals(capsys, tmp_path):
    for words, sentence in (
        ([], "reason.sh needs a model first"),
        (["--dry_run"], "reason.sh needs a model first"),
        (["nowhere"], "nowhere: neither a preset nor a folder; give a folder, a Hub name or one of dream_7b"),
        (["tiny", "--task", "nothing"], "--task nothing: neither a task nor a file; there are gsm8k, math"),
        (["tiny", "--task", "sudoku", "--test_file", "f"], "--test_file f: sudoku has its own test items"),
        (["tiny", "--rft_learning_rate", "0"], "--rft_learning_rate is 0.0, expected more than 0"),
        (["tiny", "--k", "1"], "--k is 1; a pair needs two responses"),
        (["tiny", "--hours", "0"], "--hours is 0.0, expected more than 0"),
        (["tiny", "--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["tiny", "--problems", "9000", "--dry_run"], "--problems and --validation: 9150 are asked for"),
        ([*LLADA, "--hours", "0.01", "--dry_run"], "--hours 0.01: 32 problems, the fewest, take"),
    ):
        assert sentence in refusal(reason.main, capsys, *words)


def test_another_plan_in_the_same_folder_is_refused(capsys, tmp_path):
    """The numbers of the first start stay, and a command that asks for others is told so."""
    out, words = tmp_path / "out", ["tiny", "--out", str(tmp_path / "out"), "--dry_run"]
    args, machine_args = reason.read_arguments(words)
    planner, _ = reason.planned(args, machine_args)
    asked = reason.asked_of(args)
    loop = reason.begin(args, planner, planner.numbers(20), out, asked)
    loop.stages.lock.close()
    assert "a round: 20 problems" in printed(reason.main, capsys, *words)
    said = refusal(reason.main, capsys, *words, "--seed", "2")
    assert "plan.json: that loop has seed = 1, this one 2; give this one another --out, or the same value" in said


# --- problems and rows ------------------------------------------------------------------------------------


def test_problems_of_a_file_are_divided(tmp_path):
    """Test, validation and the rounds' problems share no prompt; a prompt that is there twice counts once."""
    rows = [{"prompt": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(80)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    args, _ = reason.read_arguments(["tiny", "--task", str(path), "--rounds", "2"])
    assert reason_problems.available(args) == (60, 20) and reason_problems.prompt_tokens(args) == (24, 24)
    reason_problems.write(tmp_path, args, reason.Numbers(problems=20, k=4, validation=15, test=20))
    folder = tmp_path / "problems"
    files = [folder / "test/mine.jsonl", folder / "validation/mine.jsonl", *sorted(folder.glob("round-*.jsonl"))]
    parts = [[row["prompt"] for row in reason_problems.read_rows(path)] for path in files]
    assert list(map(len, parts)) == [20, 15, 20, 20] and len({prompt for part in parts for prompt in part}) == 75


def test_a_file_of_test_items(tmp_path):
    """All of it is for the test, none of it is trained on."""
    for name, numbers in (("mine", range(40)), ("theirs", range(30, 50))):
        rows = [{"prompt": f"What is {number} + 1?", "answer": str(number + 1)} for number in numbers]
        reason_problems.write_rows(tmp_path / f"{name}.jsonl", rows)
    words = ["tiny", "--task", str(tmp_path / "mine.jsonl"), "--test_file", str(tmp_path / "theirs.jsonl")]
    args, _ = reason.read_arguments(words)
    assert reason_problems.available(args) == (30, 20)
    training, test = reason_problems.own_rows(args.task, args.test_file, args.seed)
    assert {row["answer"] for row in training} == {str(number) for number in range(1, 31)}
    assert [row["answer"] for row in test] == [str(number) for number in range(31, 51)]


def test_flags_of_the_sampler(capsys):
    """Those of the command win over the task's, for every model."""
    flags = ["--gen_length", "96", "--block_length", "16", "--steps", "24", "--cache", "none"]
    said = printed(reason.main, capsys, *LLADA, *flags, "--rft_learning_rate", "2e-5", "--dry_run")
    assert said.count("--gen_length 96 --block_length 16 --cache none --steps 24") == 3
    assert "--threshold" not in said and said.count("--learning_rate 2e-05") == 2


def test_a_preset_of_ones_own(capsys, tmp_path):
    """Its loss is that of dpo; rft is SFT alone."""
    (tmp_path / "mine.yaml").write_text("use_mixed_precision: 'no'\nsft_weight: 5\nlearning_rate: 2e-4\n")
    words = [str(tmp_path / "mine.yaml"), "--model", "examples/tiny", "--task", "arithmetic", "--dry_run"]
    said = printed(reason.main, capsys, *words)
    assert said.count("--sft_weight 0 ") == 2 and said.count("FITS") == 4


def test_generated_problems_are_divided(tmp_path):
    args, _ = reason.read_arguments(["tiny", "--task", "arithmetic"])
    reason_problems.write(tmp_path, args, reason.Numbers(problems=30, k=4, validation=20, test=10))
    rows = [reason_problems.read_rows(path) for path in sorted((tmp_path / "problems").rglob("*.jsonl"))]
    assert list(map(len, rows)) == [30, 20] and len({row["prompt"] for part in rows for row in part}) == 50


def sample(number, place, text, correct, ended=True):
    return {"number": number, "sample": place, "text": text, "correct": correct, "ended": ended}


def test_rows_are_chosen_in_turns(tmp_path):
    """Right responses that ended, each text once, of all problems before a second of one; the same for pairs."""
    lines = [sample(1, 1, "d", False), sample(1, 0, "c", True), sample(0, 2, "a", True), sample(0, 1, "b", True)]
    lines += [sample(0, 0, "a", True), sample(0, 3, "cut", True, ended=False)]
    text = "\n".join([HEADER, *map(json.dumps, lines)]) + "\n"
    (tmp_path / "prefs.jsonl.samples.jsonl").write_text(text)
    pairs = [{"prompt": prompt, "chosen": chosen, "rejected": "r"} for prompt, chosen in ("pa", "pb", "qc")]
    reason_problems.write_rows(tmp_path / "prefs.jsonl", pairs)
    reason_problems.write_rows(tmp_path / "source.jsonl", [{"prompt": "p"}, {"prompt": "q"}])
    for most, wanted in ((2, "ac"), (9, "acb")):
        found = reason_problems.choose(tmp_path, tmp_path / "source.jsonl", most)
        rows = reason_problems.read_rows(tmp_path / "right.jsonl")
        assert [(row["prompt"], row["response"]) for row in rows] == list(zip("pqp", wanted))
        assert [row["chosen"] for row in reason_problems.read_rows(tmp_path / "pairs.jsonl")] == list(wanted)
    assert (found["right"], found["responses"], found["pairs"], found["ended"]) == (5, 6, 3, 5)


def test_the_start_stands_among_the_candidates():
    """Of equal accuracies the start is chosen, and methods are ordered by what they chose."""
    rounds = {
        "dpo": [{"candidates": {"start": 0.5, "dpo": 0.5}, "chosen": "start"}],
        "rft": [{"candidates": {"start": 0.5, "rft-1": 0.6, "rft-3": 0.7}, "chosen": "rft-3"}],
    }
    assert reason_results.by_validation(rounds) == ["rft-3", "start"]
    assert reason.best_of({"start": 0.5, "a": 0.5}) == "start" and reason.best_of({"start": 0.5, "a": 0.6}) == "a"


class Told(reason.Loop):
    """A Loop whose stages do nothing; a model's accuracy is told by its name."""

    def __init__(self, out, accuracies, rounds, merges):
        self.args, self.out, self.accuracies = SimpleNamespace(rounds=rounds), out, accuracies
        self.planner = SimpleNamespace(methods=["dpo", "rft"], merges=merges)
        self.start, self.models, self.sampled = SimpleNamespace(model="start"), ["start"], []

    def validate(self, name):
        return {model: self.accuracies[model] for model in self.models}

    def test(self, name, models):
        pass

    def sample(self, number, folder, model):
        self.sampled.append((number, model))

    def train(self, folder, run, model):
        return f"{run} of {model}"

    def merged(self, model, folder):
        return f"merged {model}" if self.planner.merges else model


def test_rounds_go_on_from_what_was_chosen(tmp_path):
    """DPO gains nothing and ends after a round; RFT goes on from its checkpoint, until a round gains nothing."""
    first, second = "rft-1 of start", "rft-3 of rft-1 of start"
    shares = {"start": 0.5, "dpo of start": 0.4, first: 0.6, "rft-3 of start": 0.55, f"rft-1 of {first}": 0.5}
    shares |= {second: 0.7, f"rft-1 of {second}": 0.7, f"rft-3 of {second}": 0.1}
    told = Told(tmp_path, shares, rounds=9, merges=False)
    rounds = told.run()
    assert [each["chosen"] for each in rounds["dpo"]] == ["start"]
    assert [each["chosen"] for each in rounds["rft"]] == [first, second, second]
    assert told.sampled == [(1, "start"), (1, "start"), (2, first), (3, second)]


def test_an_adapter_competes_with_itself_merged(tmp_path):
    """Where rounding took what an adapter had gained, the adapter is chosen, not what it was merged into."""
    first = "rft-1 of start"
    shares = {"start": 0.5, "dpo of start": 0.5, first: 0.7, "rft-3 of start": 0.5, f"merged {first}": 0.5}
    shares |= {f"rft-1 of merged {first}": 0.6, f"rft-3 of merged {first}": 0.6}
    rounds = Told(tmp_path, shares, rounds=3, merges=True).run()["rft"]
    assert [each["chosen"] for each in rounds] == [first, first] and not rounds[-1]["gained"]


def test_a_torn_log_of_stages(tmp_path):
    """A line that a kill has cut off is made again; a stage that began and did not end is not done."""
    log = reason_results.StageLog(tmp_path / "stages.jsonl")
    log.began("one", 0.5)
    log.ended("one", 1800)
    log.began("two", None)
    with open(log.path, "a") as file:
        file.write('{"stage": "two", "sec')
    log = reason_results.StageLog(log.path)
    assert log.done == {"one"} and log.number("two") == 2 and log.number("three") == 3
    log.began("two", None)
    log.ended("two", 36)
    assert reason_results.StageLog(log.path).table() == [["one", "0.5", "0.5", 1], ["two", "", "0.01", 2]]


# --- the table of several seeds ---------------------------------------------------------------------------


def write_seed(folder, seed, verdicts, task="arithmetic"):
    """A folder as reason.sh leaves it. verdicts: {"start" or a method: "1" or "0" for each test item}"""
    count = len(verdicts["start"])
    prompts = [f"What is {number}?" for number in range(count)]
    if task in tasks.FAMILIES:
        prompts = [problem.prompt for problem in tasks.generate(count, "test", seed, (task,))]
    models = {name: f"{folder}/round-{1 + (name == 'rft')}/{name}-1/final" for name in verdicts} | {"start": "tiny"}
    (folder / "test").mkdir(parents=True)
    for name, each in verdicts.items():
        rows = [{"id": prompt, "prompt": prompt, "correct": each[place] == "1"} for place, prompt in enumerate(prompts)]
        reason_problems.write_rows(folder / "test" / f"{name}.jsonl", rows)
    test = {"models": {name: {"path": model} for name, model in models.items()}}
    test["table"] = [{"model": name, "file": f"{name}.jsonl"} for name in verdicts]
    methods = {name: {"model": model} for name, model in models.items() if name != "start"}
    results = {"task": task, "numbers": {"test": count}, "start": {"model": "tiny"}, "methods": methods}
    for path, value in (("results", results), ("plan", {"asked": {"seed": seed}}), ("test/results", test)):
        (folder / f"{path}.json").write_text(json.dumps(value))
    return str(folder)


def test_seeds_are_pooled(capsys, tmp_path):
    """Won and lost are summed over seeds, and so are the problems of each number of steps."""
    one = write_seed(tmp_path / "one", 1, {"start": "110000", "rft": "110111", "dpo": "011110"})
    two = write_seed(tmp_path / "two", 2, {"start": "0000", "rft": "1100", "dpo": "1111"})
    said = printed(improve.main, capsys, one, two, "--out", str(tmp_path / "all.json"))
    found = json.loads((tmp_path / "all.json").read_text())
    assert [(row["seed"], row["n"]) for row in found["seeds"]] == [(1, 6), (2, 4)]
    assert {name: each["accuracy"] for name, each in found["pooled"]["models"].items()} == pytest.approx(
        {"start": 0.2, "rft": 0.7, "dpo": 0.8}
    )
    wanted = {"dpo - start": (7, 1, 18 / 256), "dpo - rft": (3, 2, 1.0), "rft - start": (5, 0, 2 / 32)}
    tests = found["pooled"]["tests"]
    assert {name: (each["won"], each["lost"], each["p"]) for name, each in tests.items()} == wanted
    first = {name: (each["won"], each["lost"]) for name, each in found["seeds"][0]["tests"].items()}
    assert first == {"dpo - start": (3, 1), "dpo - rft": (1, 2), "rft - start": (3, 0)}
    solved = {}  # steps: [DPO's verdicts]
    for seed, verdicts in ((1, "011110"), (2, "1111")):
        for problem, verdict in zip(tasks.generate(len(verdicts), "test", seed), verdicts):
            solved.setdefault(str(len(problem.steps)), []).append(int(verdict))
    shares = {steps: (each["n"], each["accuracy"]) for steps, each in found["by_steps"]["dpo"].items()}
    assert shares == {steps: (len(each), sum(each) / len(each)) for steps, each in solved.items()} and len(shares) > 1
    assert re.search(r"^all +10 +0.200 +0.700 +0.800 +\+0.600 \(7:1, 0.07\)", said, re.M)
    assert "round-2/rft-1, dpo-1" in said and "items are different" not in said


def test_seeds_that_share_their_test_items(capsys, tmp_path):
    """A benchmark's, or a file's: pooled with a word about it, of one method alone, without steps."""
    verdicts, files = {"start": "000", "dpo": "001"}, ("a/arithmetic.jsonl", "b/arithmetic.jsonl")
    folders = [write_seed(tmp_path / file[0], 1, verdicts, file) for file in files]
    said = printed(improve.main, capsys, *folders, "--out", str(tmp_path / "all.json"))
    assert "3 of the 6 items are different" in said and "RFT" not in said and "steps" not in said
    assert improve.pooled(improve.read_all(folders))["pooled"]["tests"]["dpo - start"]["won"] == 2


def test_seeds_that_cannot_be_pooled(capsys, tmp_path):
    one = write_seed(tmp_path / "one", 1, {"start": "00", "dpo": "01"})
    other = write_seed(tmp_path / "other", 2, {"start": "00", "dpo": "01"}, "gsm8k")
    for folders, sentence in (
        ([one, f"{one}/../one"], "a folder is named twice; expected one of reason.sh for each seed"),
        ([one, other], "other: gsm8k by start, dpo, and"),
        ([f"{one}/test"], "one/test/results.json: not written by reason.sh"),
        ([str(tmp_path)], "results.json: cannot be read"),
    ):
        assert sentence in refusal(improve.main, capsys, *folders, "--out", str(tmp_path / "all.json"))
    assert not (tmp_path / "all.json").exists()


# --- the whole loop ---------------------------------------------------------------------------------------

SMALL = "--problems 24 --validation 24 --test 24 --k 4"


def loop(clone, out, seconds=None):
    """Run the loop of the embedded model; kill it with all of its processes after so many seconds. Returns its output.

    None if it was killed.
    """
    command = f"exec bash examples/reason.sh examples/tiny --task arithmetic {SMALL} --out runs/{out}"
    options = {"cwd": clone, "env": shell_environment(fresh=True), "text": True, "start_new_session": True}
    process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)  # what it has started goes on alone, and keeps the folder locked
        process.wait()
        return None
    assert process.returncode == 0, said[-3000:]
    return said


@pytest.mark.long
def test_killed_at_random_moments(tmp_path):
    """Killed at three random moments and started again: the same results, to the last digit. Then all is done."""
    copy_of_the_repository(tmp_path)
    began = time.time()
    said = loop(tmp_path, "whole")
    seconds = time.time() - began
    assert "against the start" in said and (tmp_path / "runs/whole/report/report.html").is_file()
    rng = random.Random(26)
    for _ in range(3):
        assert loop(tmp_path, "killed", seconds=rng.uniform(0.08, 0.3) * seconds) is None
    assert loop(tmp_path, "killed")
    texts = [(tmp_path / "runs" / name / "results.json").read_text() for name in ("whole", "killed")]
    assert texts[1].replace("runs/killed", "runs/whole") == texts[0]
    assert "python evaluate.py" not in loop(tmp_path, "killed")
