"""Tests of tracking.py: the time left, the line on a terminal and elsewhere, TensorBoard and W&B for real, resumed runs.

.venv/bin/python -m pytest -q tests/test_tracking.py
"""

import importlib.util
import json
import math
import os
import pty
import random
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from small import ENV, LAUNCHER, ROOT, call, flags, log, make_model, make_pairs, pack, refusal, run, start

import score
import train_dpo
from files import InputError
from preferences import packed as disk
from scoring.noise import step_of_state
from training import tracking

STEPS, PER_STEP = 6, 2
RUN = flags(
    use_mixed_precision="no",
    diffusion_steps=3,
    trajectories=2,
    states_per_forward=5,
    learning_rate=3e-3,
    max_steps=STEPS,
    gradient_accumulation_steps=PER_STEP,
    eval_fraction=0.25,
    eval_steps=4,
    save_steps=2,
    save_total_limit=0,
    logging_steps=2,
)
# what TRL's DPOTrainer shows in TensorBoard and W&B
TRL = {
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/epoch",
    "train/num_tokens",
    *(
        f"{side}/{name}"
        for side in ("train", "eval")
        for name in (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        )
    ),
    "eval/loss",
}


# --- the time left ----------------------------------------------------------------------------------------


def drive(clock, tokens, start, rng, pace, evaluation, eval_steps, save, save_steps, noise=0.2):
    """A run whose steps take what their tokens take, give or take: [(when, what the clock says is left)], and when it ends."""
    now, said = 0.0, []
    for step in range(start + 1, clock.steps + 1):
        seconds = pace(step) * tokens[step - 1 - start] * rng.uniform(1 - noise, 1 + noise) + (
            5 if step == start + 1 else 0
        )
        now += seconds
        clock.stepped(seconds)
        if eval_steps and step % eval_steps == 0 or step == clock.steps:
            now += evaluation
            clock.evaluation_seconds.append(evaluation)
        said.append((now, clock.left(step, True)))
        if save_steps and step % save_steps == 0:
            now += save
            clock.save_seconds.append(save)
    return said, now


@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("eval_steps, save_steps", [(0, 0), (50, 0), (0, 25), (100, 40), (7, 7)])
def test_time_left_is_right_within_a_tenth(start, eval_steps, save_steps):
    rng = random.Random(eval_steps)
    tokens = np.array([rng.randrange(500, 4000) for _ in range(400 - start)])
    clock = tracking.Clock(tokens, int(tokens[:20].sum()), eval_steps, save_steps, start)
    said, end = drive(clock, tokens, start, rng, lambda step: 1e-3, 20.0, eval_steps, 3.0, save_steps)
    late = [(now, left) for now, left in said if now > 0.1 * end]
    assert all(abs(now + left - end) < 0.1 * end for now, left in late)
    assert said[-1][1] == 0 or save_steps and said[-1][1] == pytest.approx(0, abs=1e-9)


def test_time_left_follows_a_machine_that_slows_down():
    tokens = np.full(400, 1000)
    said, end = drive(
        tracking.Clock(tokens, 0, 0, 0, 0),
        tokens,
        0,
        random.Random(0),
        lambda step: 1e-3 if step < 50 else 3e-3,
        0,
        0,
        0,
        0,
    )
    now, left = said[200]
    assert abs(now + left - end) < 0.1 * end


def test_time_left_counts_evaluations_and_saves_to_come():
    def left(eval_steps, save_steps, evaluated, evaluation=400, start=0):
        clock = tracking.Clock(np.full(10 - start, 100), evaluation, eval_steps, save_steps, start)
        for _ in range(start, 5):
            clock.stepped(1.0)
        if evaluated:
            clock.evaluation_seconds.append(3.0)
        clock.save_seconds.append(0.5)
        return clock.left(5, evaluated)

    assert left(5, 0, False) == pytest.approx(5 + 2 * 400 * 0.01 / 3)  # none was made yet: a third of a step's pace
    assert left(5, 0, True) == left(5, 0, True, start=3) == pytest.approx(5 + 3)
    assert left(4, 0, True) == pytest.approx(5 + 2 * 3)  # after 8, and at the end
    assert left(0, 2, True) == pytest.approx(5 + 3 + 3 * 0.5)
    assert left(4, 0, True, evaluation=0) == pytest.approx(5)  # no pair is held out


@pytest.mark.parametrize("start", [0, 4])
def test_what_is_due_after_each_step(start):
    clock = tracking.Clock(np.full(10 - start, 100), 400, 4, 3, start)
    assert [step for step in range(start + 1, 11) if clock.due(step)[0]] == [
        step for step in (4, 8, 10) if step > start
    ]
    assert [step for step in range(start + 1, 11) if clock.due(step)[1]] == [step for step in (3, 6, 9) if step > start]
    assert not any(any(tracking.Clock(np.full(10, 100), 0, 4, 0, 0).due(step)) for step in range(1, 11))


# --- a run, and one that goes on, on a terminal -----------------------------------------------------------


def on_a_terminal(command, env):
    """What the command writes to a terminal of 100 columns, and its exit code."""
    master, slave = pty.openpty()
    null = subprocess.DEVNULL
    process = start(command, env={**env, "COLUMNS": "100"}, stdout=slave, stderr=null, stdin=null)
    os.close(slave)
    said = b""
    while True:
        try:
            block = os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
        said += block
    os.close(master)
    return said.decode(), process.wait(60)


@pytest.fixture(scope="module")
def ran(tiny_dir, tmp_path_factory):
    """A run with both trackers; a copy of it, stopped after step 4 of 6, that goes on upon a terminal."""
    folder = tmp_path_factory.mktemp("tracking")
    model = make_model(folder / "model", tiny_dir)
    data = pack(folder / "packed", make_pairs([(5, 9, 11)] * 8, seed=3), model)
    call(score.main, "--data", data, *RUN)
    try:
        import wandb  # noqa: F401

        trackers = "tensorboard,wandb"
    except ImportError:
        trackers = "tensorboard"
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER and not name.startswith("WANDB")}
    env |= ENV | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    os.environ["WANDB_MODE"] = "offline"
    command = [
        ROOT / "train_dpo.py",
        "--data",
        data,
        *RUN,
        "--deepspeed",
        ROOT / "ds_configs" / "zero0.json",
        "--report_to",
        trackers,
    ]
    try:
        said = run([*command, "--output_dir", folder / "whole"])
    finally:
        del os.environ["WANDB_MODE"]
    shutil.copytree(folder / "whole", folder / "again", ignore=shutil.ignore_patterns("final", "step-6"))
    screen, code = on_a_terminal([*command, "--output_dir", folder / "again"], env)
    assert code == 0, screen
    return SimpleNamespace(folder=folder, data=data, model=model, said=said, screen=screen, trackers=trackers)


def test_plain_lines(ran):
    """Not on a terminal: one line a print, none rewritten; the first, every second, those with an evaluation."""
    lines = [line for line in ran.said.splitlines() if line.startswith("step ")]
    assert [line.split(" | ")[0] for line in lines] == [f"step {n}/{STEPS}" for n in (1, 2, 4, 6)]
    assert "\r" not in ran.said and "\x1b" not in ran.said
    for line in lines:
        step = int(re.match(r"step (\d+)", line)[1])
        for words in (
            rf"\| pair {step * PER_STEP}/{STEPS * PER_STEP} \|",
            r"loss \d\.\d{4}",
            r"margin [+-]\d+\.\d{3}",
            r"accuracy \d\.\d\d",
            r"\d pairs/s",
            r"host \d+\.\d GiB",
            r"\d:\d\d:\d\d left$",
        ):
            assert re.search(words, line), (words, line)
    assert all(re.search(r"eval accuracy \d\.\d{3} \[", line) for line in lines[2:]) and lines[-1].endswith(
        "0:00:00 left"
    )


def test_line_on_a_terminal(ran):
    """Rewritten pair by pair, never wider than the terminal; what is printed for good stands on lines of its own."""
    assert f"pair 9/{STEPS * PER_STEP}" in ran.screen and "evaluating 1/2 held-out pairs" in ran.screen
    for part in re.split(r"[\r\n]+", ran.screen):
        if re.search(r"pair 9/|pair 11/|evaluating", part):
            assert part.startswith("\x1b[K") and len(part.removeprefix("\x1b[K")) < 100
    kept = [part.split("\r")[-1].removeprefix("\x1b[K") for part in ran.screen.replace("\r\n", "\n").split("\n")]
    assert [line.split(" | ")[0] for line in kept if line.startswith("step ")] == ["step 5/6", "step 6/6"]


def test_next_commands(ran):
    assert f"next: python report.py {ran.folder / 'whole'}" in ran.said


def events(folder):
    """{name: [steps]}, {name: [values]} as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    found = {name: read.Scalars(name) for name in read.Tags()["scalars"]}
    return (
        {name: [event.step for event in each] for name, each in found.items()},
        {name: [event.value for event in each] for name, each in found.items()},
        read.Tags()["tensors"],
    )


def test_tensorboard(ran):
    for name in ("whole", "again"):  # the second: the steps that were done twice stand once
        steps, values, texts = events(ran.folder / name)
        assert TRL <= steps.keys() and "args/text_summary" in texts
        assert steps["train/loss"] == list(range(1, STEPS + 1)) and steps["eval/loss"] == [4, 6], name
        lines = log(ran.folder / name)
        assert np.allclose(values["train/rewards/margins"], [line["rewards/margins"] for line in lines])
        assert np.allclose(values["eval/rewards/accuracies"], [lines[i]["eval_rewards/accuracies"] for i in (3, 5)])


def wandb_records(path):
    """The protocol-buffer records of a W&B file: a header of 7 bytes, then LevelDB's log, blocks of 32 KiB of pieces (4 bytes of
    checksum, 2 of length, 1 of kind: whole, first, middle, last)."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb(ran):
    """Offline, for real: what its own file holds, under TRL's names; a run that goes on has the same id."""
    if "wandb" not in ran.trackers:
        pytest.skip("no wandb: pip install -r requirements-wandb.txt")
    ids = set()
    for name, count in (("whole", STEPS), ("again", STEPS - 4)):
        path = sorted((ran.folder / name / "wandb").glob("offline-run-*/*.wandb"))[-1]
        history, config = [], {}
        for record in wandb_records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                history.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
        assert len(history) == count and TRL <= {key for row in history for key in row}
        assert [row["train/global_step"] for row in history] == list(range(STEPS - count + 1, STEPS + 1))
        assert config["beta"] == 0.1
    assert ids == {(ran.folder / "whole" / "wandb.id").read_text()}


def test_scores_of_pairs(ran):
    """Each trained pair once a use, each held-out pair at each evaluation; sums that agree with the log; the first step's margin is 0."""
    entries = [json.loads(line) for line in (ran.folder / "whole" / "scores.jsonl").read_text().splitlines()]
    lines, S = log(ran.folder / "whole"), len(step_of_state("spread", 3, 2))
    margin = lambda entry: (
        sum(entry["policy"][0]) - sum(entry["ref"][0]) - sum(entry["policy"][1]) + sum(entry["ref"][1])
    )  # noqa: E731
    for step in range(1, STEPS + 1):
        mine = [entry for entry in entries if entry["step"] == step and entry["split"] == "train"]
        assert len(mine) == PER_STEP
        assert np.mean([0.1 * margin(entry) for entry in mine]) == pytest.approx(
            lines[step - 1]["rewards/margins"], abs=1e-3
        )
    for step in (4, 6):
        held = [entry for entry in entries if entry["step"] == step and entry["split"] == "eval"]
        assert len({entry["pair"] for entry in held}) == len(held) == 2
        assert np.mean([0.1 * margin(entry) for entry in held]) == pytest.approx(
            lines[step - 1]["eval_rewards/margins"], abs=1e-3
        )
    assert len(entries) == STEPS * PER_STEP + 4 and all(
        np.shape(entry[each]) == (2, S) for entry in entries for each in ("policy", "ref")
    )
    assert all(abs(margin(entry)) < 1e-3 for entry in entries if entry["step"] == 1)
    assert all(entry["line"] == disk.Packed(ran.data).lines()[entry["pair"]] for entry in entries)
    assert (ran.folder / "again" / "scores.jsonl").read_bytes() == (ran.folder / "whole" / "scores.jsonl").read_bytes()


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, found",
    [("tensorboard", ["tensorboard"]), ("none", []), ("", []), ("wandb, tensorboard", ["wandb", "tensorboard"])],
)
def test_names(text, found, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert tracking.names(text) == found


def test_unknown_tracker(ran, tmp_path, capsys):
    said = refusal(
        train_dpo.main, capsys, "--data", ran.data, *RUN, "--report_to", "mlflow", "--output_dir", tmp_path / "run"
    )
    assert "mlflow" in said and "tensorboard, wandb" in said and not (tmp_path / "run").exists()
    with pytest.raises(InputError):
        tracking.names("tensorboard,all")


@pytest.mark.parametrize("name, file", [("wandb", "requirements-wandb.txt"), ("tensorboard", "requirements.txt")])
def test_not_installed(monkeypatch, name, file):
    """Said before anything is loaded or written."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: None if each == name else each)
    with pytest.raises(InputError, match=f"{name} is not installed.*{file}"):
        tracking.names("tensorboard,wandb")


def test_wandb_without_a_login(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="pip install -r requirements-wandb.txt")

    def init(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(InputError, match="No API key configured. Use `wandb login`.*WANDB_MODE=offline"):
        tracking.WandB(SimpleNamespace(folder=tmp_path), SimpleNamespace(run_name=None, output_dir="runs/a"), {}, 1)


def test_a_run_begun_anew_is_another_in_wandb(monkeypatch, tmp_path):
    wandb, ids = pytest.importorskip("wandb", reason="pip install -r requirements-wandb.txt"), []
    monkeypatch.setattr(
        wandb, "init", lambda **given: ids.append(given["id"]) or SimpleNamespace(define_metric=lambda *_, **__: None)
    )
    for first in (1, 5, 1):
        tracking.WandB(SimpleNamespace(folder=tmp_path), SimpleNamespace(run_name=None, output_dir="runs/a"), {}, first)
    assert ids[0] == ids[1] != ids[2]


def test_an_evaluation_that_is_not_finite_is_said():
    """It once ended the run in a traceback."""
    clock = tracking.Clock(np.full(4, 10), 0, 0, 0, 0)
    record = tracking.Record(None, SimpleNamespace(first=True), None, None, [], clock, 2)
    line = {
        "step": 4,
        "skipped": False,
        "loss": 0.5,
        "rewards/margins": 0.1,
        "rewards/accuracies": 1.0,
        "eval_loss": None,
        "eval_rewards/accuracies": 0.5,
        "eval_rewards/accuracies_ci95": [0.1, 0.9],
        "learning_rate": 1e-4,
        "pairs_per_second": 1.0,
        "tokens_per_second": 1.0,
        "gpu_peak_gib": 3.0,
        "host_peak_gib": 1.0,
        "seconds_left": 0.0,
    }
    assert "eval loss not finite | eval accuracy 0.500 [0.100, 0.900]" in record.words(line)


def test_numbers_that_json_has_no_word_for():
    from scoring.objective import finite

    assert finite(np.array([[1.23456, -0.00001, math.nan, math.inf]])) == [[1.2346, 0.0, None, None]]
    assert json.dumps(finite(np.array([[-0.00001]]))) == "[[0.0]]"
