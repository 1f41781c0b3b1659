"""Tests of stopping and resuming: kills at random moments, signals, a full disk, two runs at once, damaged files.

bash tests/run.sh tests/faults/test_kills.py        # bench/faults.py is the longest version of the first
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from small import (
    LENGTHS,
    ROOT,
    call,
    flags,
    last_of_each,
    log,
    make_model,
    make_pairs,
    numbers,
    pack,
    refusal,
    run,
    shell,
    shell_environment,
    start,
)

sys.path.insert(0, str(ROOT / "bench"))
import faults  # noqa: E402

import files
import score
import train_dpo
from training import runs

DS = ROOT / "ds_configs" / "zero3_offload_4080.json"
NOISE = flags(use_mixed_precision="no", diffusion_steps=3, trajectories=2, tokens_per_forward=200)
TRAIN = flags(
    learning_rate=3e-3, gradient_accumulation_steps=2, max_steps=6, eval_fraction=0.3, eval_steps=2, save_total_limit=0
)


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    """Packed pairs, their reference scores, and an undisturbed run."""
    folder = tmp_path_factory.mktemp("kills")
    model = make_model(folder / "model", tiny_dir)
    data = pack(folder / "packed", make_pairs(LENGTHS[:12], 3), model)
    argv = ["--data", data, *NOISE, *TRAIN]
    call(score.main, "--data", data, *NOISE)
    made = SimpleNamespace(folder=folder, model=model, data=data, argv=argv)
    run(training(made, folder / "whole"))
    return made


def weights(folder):
    return files.file_sha256(folder / "final" / "model.safetensors")


def same(home, folder):
    assert numbers(folder) == numbers(home.folder / "whole") and weights(folder) == weights(home.folder / "whole")


@pytest.mark.parametrize("count", [9, pytest.param(45, marks=pytest.mark.long)])
def test_random_kills(tmp_path, count):
    seed = random.randrange(10**6)
    kills, _, wrong = faults.measure(tmp_path, ["train", "score", "prep"], count, seed, str(DS))
    assert not wrong, (seed, wrong)
    assert kills.total() >= count


def training(home, folder, *more):
    """The command of home's run, into `folder`."""
    return [ROOT / "train_dpo.py", *home.argv, "--deepspeed", DS, "--output_dir", folder, *more]


def wait_for(process, ready):
    """Wait until ready(); fail if the process ends before."""
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves(home, tmp_path, number):
    """It ends with 0 and a checkpoint that no save_steps asked for, and prints the command that resumes the run."""
    command = training(home, tmp_path / "run")
    process = start(command)
    lines = tmp_path / "run" / "log.jsonl"
    wait_for(process, lambda: lines.exists() and len(lines.read_text().splitlines()) > 1)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "Traceback" not in said and not (tmp_path / "run" / "final").exists(), said
    assert "stopping: finishing the pass in hand" in said and "stopped and saved; to resume, run: python " in said
    [(step, path)] = runs.Run(tmp_path / "run").saved()
    assert step >= 2 and not runs.torn(path)
    assert f"resuming after step {step}" in run(command)
    same(home, tmp_path / "run")


def test_two_signals_stop_at_once(home, tmp_path):
    process = start(training(home, tmp_path / "run", "--gradient_accumulation_steps", 4000))
    wait_for(process, lambda: (tmp_path / "run" / "run.json").exists())
    time.sleep(1)
    began = time.time()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (0, 128 + signal.SIGTERM) and time.time() - began < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_launch_stops_and_goes_on(home, tmp_path, number):
    """launch.sh on two ranks gets a signal: the ranks save, and the command that is printed resumes the run."""
    argv = [*home.argv, *flags(num_gpus=2, model_name_or_path=home.model, output_dir=tmp_path / "run")]
    argv += flags(gradient_accumulation_steps=1)
    command = ["bash", ROOT / "launch.sh", DS, *last_of_each(argv)]
    one_pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, text=True, env=shell_environment(), **one_pipe)
    wait_for(process, lambda: (tmp_path / "run" / "log.jsonl").exists())
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == (0 if number == signal.SIGTERM else -number), said
    assert "stopped and saved; to resume, run: bash " in said, said
    again = shell(said.rpartition("to resume, run: ")[2].strip(), ROOT)
    assert again.returncode == 0 and "resuming after step" in again.stdout, again.stdout + again.stderr
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    for mine, whole in zip(log(tmp_path / "run"), log(home.folder / "whole")):  # two ranks of one pair are one of two
        assert mine["loss"] == pytest.approx(whole["loss"], abs=1e-4)


def test_a_full_disk(home, tmp_path):
    """A file does not fit: one sentence, the last checkpoint stays, and with room the run resumes from it."""
    command = training(home, tmp_path / "run", "--save_steps", 1)
    process = start(command)
    wait_for(process, lambda: (tmp_path / "run" / "checkpoints" / "step-2").exists())
    limit = 100_000  # bytes of any one file: less than a checkpoint's
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "Traceback" not in said, said
    assert "cannot be written" in said and "Free some disk space" in said, said
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*.tmp"))
    newest = runs.Run(tmp_path / "run").start_from(None)
    assert int(newest.name[5:]) >= 2 and f"{newest} is complete" in said
    assert f"resuming after step {newest.name[5:]}" in run(command)
    same(home, tmp_path / "run")


def test_two_runs_in_one_folder(home, tmp_path, capsys):
    """The second is refused while the first lives; a dead one keeps no lock."""
    command = training(home, tmp_path / "run", "--save_steps", 1)
    process = start(command)
    wait_for(process, lambda: (tmp_path / "run" / "checkpoints" / "step-1").exists())
    os.kill(process.pid, signal.SIGSTOP)
    said = refusal(train_dpo.main, capsys, *training(home, tmp_path / "run")[1:])
    assert f"a run is using it (process {process.pid} on " in said
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert "resuming after step" in run(command)
    same(home, tmp_path / "run")


def test_two_reference_jobs_share(home, tmp_path):
    """Both ask for the same scores at once: one makes them, the other waits and takes them."""
    data = shutil.copytree(home.data, tmp_path / "packed", ignore=shutil.ignore_patterns("ref-*"))
    both = [start([ROOT / "score.py", "--data", data, *NOISE]) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("in a forward pass" in each for each in said) == 1, said
    [made], [want] = data.glob("ref-*"), home.data.glob("ref-*")
    for name in ("noise-0.npy", "ref_scores-0.npy"):
        assert files.file_sha256(made / name) == files.file_sha256(want / name)


def read_all(argv):
    """What training reads; the lines, it reads in need alone."""
    train_dpo.prepare(train_dpo.read_arguments(argv))[0].packed.lines()


def harmed(content, rng, flips):
    """`content` cut short in several places, and with one bit flipped at both ends and at random."""
    yield from (content[:cut] for cut in (0, 1, len(content) // 2, len(content) - 1))
    for bit in [0, 8 * len(content) - 1] + [rng.randrange(8 * len(content)) for _ in range(flips)]:
        yield content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def same_value(path, content):
    """Whether a harmed file still says the same, as a JSON file without its last newline does."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_bytes()) == json.loads(content)
        return path.suffix == ".npy" and np.array_equal(np.load(path), np.load(io.BytesIO(content)))
    except Exception:
        return False


def test_every_artifact_harmed(home, tmp_path, capsys):
    """Each file of packed/ and ref-*/ is cut short, or a bit of it flipped: refused, with the folder's name."""
    rng, tried = random.Random(0), 0
    argv = [*home.argv, "--deepspeed", DS, "--output_dir", tmp_path / "run"]
    patterns = ("*.npy", "meta.json", "ref-*/*.npy", "ref-*/meta.json")
    for path in sorted(path for pattern in patterns for path in home.data.glob(pattern)):
        original = path.read_bytes()
        for content in harmed(original, rng, 14):
            path.write_bytes(content)
            if not same_value(path, original):
                said = refusal(read_all, capsys, *argv)
                assert str(path.parent) in said, (path, said)
                tried += 1
        path.write_bytes(original)
    assert tried > 80
    read_all(list(map(str, argv)))


def test_every_file_of_a_checkpoint_harmed(home, capsys):
    """A file of the newest is cut short, or a bit of it flipped: the checkpoint before it is taken."""
    run(training(home, home.folder / "saved", "--save_steps", 3))
    target, rng = runs.Run(home.folder / "saved"), random.Random(0)
    (_, before), (_, newest) = target.saved()
    assert target.start_from(None) == newest
    for path in [path for path in newest.rglob("*") if path.is_file()]:
        original = path.read_bytes()
        for content in harmed(original, rng, 3):
            path.write_bytes(content)
            if not same_value(path, original):
                assert target.start_from(None) == before and str(newest) in capsys.readouterr().err, path
        path.write_bytes(original)
    assert len(json.loads((newest / "state.json").read_text())["files"]) >= 2 and target.start_from(None) == newest
