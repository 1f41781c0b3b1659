"""Tests of training/tracking.py: the time left, the line on a terminal and elsewhere, TensorBoard, W&B, resumed runs.

bash tests/run.sh tests/training/test_tracking.py
"""

import errno
import importlib.util
import json
import math
import os
import pty
import random
import re
import shlex
import shutil
import subprocess
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from small import ENV, LAUNCHER, ROOT, call, flags, log, make_model, make_pairs, pack, refusal, run, start

import config
import score
import train_dpo
from files import InputError
from preferences import packed as disk
from scoring.noise import step_of_state
from training import runs, tracking
from training.policy import next_commands

STEPS, PER_STEP = 6, 2
RUN = flags(
    use_mixed_precision="no",
    diffusion_steps=3,
    trajectories=2,
    tokens_per_forward=60,
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
    """A run whose steps take what their tokens take, give or take: ([(when, seconds left)], when it ends)."""
    now, said = 0.0, []
    for step in range(start + 1, clock.steps + 1):
        seconds = pace(step) * tokens[step - 1 - start] * rng.uniform(1 - noise, 1 + noise)
        seconds += 5 if step == start + 1 else 0
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
    clock = tracking.Clock(tokens, 0, 0, 0, 0)
    said, end = drive(clock, tokens, 0, random.Random(0), lambda step: 1e-3 if step < 50 else 3e-3, 0, 0, 0, 0)
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
    steps = range(start + 1, 11)
    assert list(filter(clock.evaluation_due, steps)) == [step for step in (4, 8, 10) if step > start]
    assert list(filter(clock.save_due, steps)) == [step for step in (3, 6, 9) if step > start]
    none = tracking.Clock(np.full(10, 100), 0, 4, 0, 0)
    assert not any(none.evaluation_due(step) or none.save_due(step) for step in range(1, 11))


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
    """A run with both trackers; a copy of it, stopped after step 4 of 6, that resumes on a terminal."""
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
    """Not on a terminal no line is rewritten; the first, every second and those with an evaluation are printed."""
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
    """Rewritten pass by pass, never wider than the terminal; what stays is on lines of its own."""
    assert "step 5/6 | pass 1" in ran.screen and "evaluating 2/2 held-out pairs" in ran.screen
    assert ran.screen.index("step 5/6 | pass 2") < ran.screen.index("step 6/6 | pass 1")
    for part in re.split(r"[\r\n]+", ran.screen):
        if re.search(r"\| pass \d|evaluating", part):
            assert part.startswith("\x1b[K") and len(part.removeprefix("\x1b[K")) < 100
    kept = [part.split("\r")[-1].removeprefix("\x1b[K") for part in ran.screen.replace("\r\n", "\n").split("\n")]
    assert [line.split(" | ")[0] for line in kept if line.startswith("step ")] == ["step 5/6", "step 6/6"]


def test_next_commands(ran):
    """What the run prints last: the model is as small as the embedded one."""
    run, small = ran.folder / "whole", "--gen_length 40 --block_length 8 --use_mixed_precision no"
    assert ran.said.splitlines()[-3:] == [
        f"next: python report.py {run}",
        f"then: python evaluate.py --model {run}/final --compare {ran.model} --tasks arithmetic {small}",
        f"and:  python generate.py --model {run}/final {small} --prompt '...'",
    ]


@pytest.mark.parametrize(
    "given, streams, flags",
    [
        ({"deepspeed": "ds_configs/zero3_offload_4080.json"}, True, "--deepspeed ds_configs/zero3_offload_4080.json"),
        ({"deepspeed": "ds_configs/zero3.json"}, True, "--deepspeed ds_configs/zero3_offload_4080.json"),
        ({"deepspeed": "ds_configs/zero2_offload_4080.json"}, False, ""),
        ({"lora_r": 16, "load_in_4bit": True, "deepspeed": "ds_configs/zero0.json"}, False, "--load_in_4bit True"),
    ],
)
def test_next_commands_of_a_real_model(given, streams, flags, monkeypatch):
    """They can be run as they are: other commands accept every flag, and with them weights that fit the card."""
    monkeypatch.chdir(ROOT)
    model_args = config.ModelArguments(model_name_or_path="org/8B", **given)
    lines = next_commands(runs.Run("runs/my night"), model_args, False, streams, False).splitlines()
    sampling = f"--gen_length 256 --block_length 32 {flags}".rstrip()
    assert lines == [
        "next: python report.py 'runs/my night'",
        f"then: python evaluate.py --model 'runs/my night/final' --compare org/8B --tasks gsm8k --limit 200 {sampling}",
        f"and:  python generate.py --model 'runs/my night/final' {sampling} --prompt '...'",
    ]
    _, script, *argv = shlex.split(lines[1].removeprefix("then: "))
    args, sample, _ = importlib.import_module(script.removesuffix(".py")).read_arguments(argv)
    assert args.compare == ["org/8B"] and sample.load_in_4bit == model_args.load_in_4bit
    with_blocks = next_commands(runs.Run("runs/my night"), model_args, False, streams, True)
    assert with_blocks.splitlines() == [line.replace(" --block_length 32", "") for line in lines]
    assert bool(sample.deepspeed) == streams and sample.gen_length == 256


def events(folder):
    """What TensorBoard reads: .steps and .values, {name: list}, and .texts, names."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read, steps, values = EventAccumulator(str(folder)).Reload(), {}, {}
    for name in read.Tags()["scalars"]:
        steps[name] = [event.step for event in read.Scalars(name)]
        values[name] = [event.value for event in read.Scalars(name)]
    return SimpleNamespace(steps=steps, values=values, texts=read.Tags()["tensors"])


def test_tensorboard(ran):
    for name in ("whole", "again"):  # the second: the steps that were done twice stand once
        found = events(ran.folder / name)
        assert TRL <= found.steps.keys() and "args/text_summary" in found.texts
        assert found.steps["train/loss"] == list(range(1, STEPS + 1)) and found.steps["eval/loss"] == [4, 6], name
        lines = log(ran.folder / name)
        accuracies = [lines[i]["eval_rewards/accuracies"] for i in (3, 5)]
        assert np.allclose(found.values["train/rewards/margins"], [line["rewards/margins"] for line in lines])
        assert np.allclose(found.values["eval/rewards/accuracies"], accuracies)


def test_only_tensorboards_own_thread_is_silenced(tmp_path, monkeypatch):
    """A full disk there is raised by flush(), too. What fails in another thread, and any other error, is shown."""
    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    before, full = threading.excepthook, OSError(errno.ENOSPC, "No space left on device")
    tracker = tracking.TensorBoard(runs.Run(tmp_path), None, {"beta": 0.1}, 1)
    own = tracker.writer.file_writer.event_writer._async_writer._worker
    for thread, error in ((own, full), (own, ValueError("a fault")), (threading.Thread(), full), (None, full)):
        threading.excepthook(SimpleNamespace(thread=thread, exc_value=error))
    assert [(failed.thread is own, type(failed.exc_value)) for failed in shown] == [
        (True, ValueError),
        (False, OSError),
        (False, OSError),
    ]
    tracker.close()
    assert threading.excepthook == before


def wandb_records(path):
    """The protocol-buffer records of a W&B file: a header of 7 bytes, then LevelDB's log.

    That is blocks of 32 KiB of pieces (4 bytes of checksum, 2 of length, 1 of kind: whole, first, middle, last).
    """
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
    """Offline: what W&B's own file holds, under TRL's names; a resumed run has the same id."""
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
    """Each trained pair for each use, each held-out pair at each evaluation; sums agree with the log."""
    entries = [json.loads(line) for line in (ran.folder / "whole" / "scores.jsonl").read_text().splitlines()]
    lines, S = log(ran.folder / "whole"), len(step_of_state("spread", 3, 2))

    def margin(entry):
        policy, ref = entry["policy"], entry["ref"]
        return sum(policy[0]) - sum(ref[0]) - sum(policy[1]) + sum(ref[1])

    for step in range(1, STEPS + 1):
        mine = [entry for entry in entries if entry["step"] == step and entry["split"] == "train"]
        assert len(mine) == PER_STEP
        logged = lines[step - 1]["rewards/margins"]
        assert np.mean([0.1 * margin(entry) for entry in mine]) == pytest.approx(logged, abs=1e-3)
    for step in (4, 6):
        held = [entry for entry in entries if entry["step"] == step and entry["split"] == "eval"]
        assert len({entry["pair"] for entry in held}) == len(held) == 2
        logged = lines[step - 1]["eval_rewards/margins"]
        assert np.mean([0.1 * margin(entry) for entry in held]) == pytest.approx(logged, abs=1e-3)
    assert len(entries) == STEPS * PER_STEP + 4
    assert all(np.shape(entry["policy"]) == np.shape(entry["ref"]) == (2, S) for entry in entries)
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
    argv = ["--data", ran.data, *RUN, "--report_to", "mlflow", "--output_dir", tmp_path / "run"]
    said = refusal(train_dpo.main, capsys, *argv)
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


def test_a_new_start_is_another_run_in_wandb(monkeypatch, tmp_path):
    wandb, ids = pytest.importorskip("wandb", reason="pip install -r requirements-wandb.txt"), []

    def init(**given):
        ids.append(given["id"])
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setattr(wandb, "init", init)
    for first in (1, 5, 1):
        tracking.WandB(SimpleNamespace(folder=tmp_path), SimpleNamespace(run_name=None, output_dir="runs/a"), {}, first)
    assert ids[0] == ids[1] != ids[2]


def test_an_evaluation_that_is_not_finite():
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
    of_one_kind = line | {"rewards/margins": None}  # of KTO, a step of desirable rows alone
    assert "margin" not in (said := record.words(of_one_kind)) and "accuracy 1.00" in said


def test_numbers_that_json_has_no_word_for():
    from scoring.objective import finite

    assert finite(np.array([[1.23456, -0.00001, math.nan, math.inf]])) == [[1.2346, 0.0, None, None]]
    assert json.dumps(finite(np.array([[-0.00001]]))) == "[[0.0]]"
