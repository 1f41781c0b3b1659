"""Tests of another number of ranks: from one to two and back, hosts started one by one or by HOSTFILE.

bash tests/run.sh tests/faults/test_world.py
"""

import shutil
import socket
import subprocess
from types import SimpleNamespace

import pytest
from small import LENGTHS, ROOT, flags, last_of_each, log, make_model, make_pairs, pack, run_jobs, shell_environment

CLOSE = 2e-5  # between the losses of two worlds in float32, which add up in another order
NOISE = flags(use_mixed_precision="no", diffusion_steps=2, trajectories=2, tokens_per_forward=100)
TRAIN = flags(eval_fraction=0.1, learning_rate=3e-3, warmup_ratio=0, max_steps=6, save_steps=2, save_total_limit=0)


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    model = make_model(folder / "model", tiny_dir)
    data = pack(folder / "packed", make_pairs(LENGTHS[:16], 5), model)
    run_jobs(folder / "out", None, [("score", "score", ["--data", data, *NOISE])])
    return SimpleNamespace(folder=folder, model=model, data=data)


@pytest.mark.parametrize(
    "stage, more", [("zero3_offload_4080", ()), ("zero2_offload_4080", ("--lora_r", 4)), ("zero0", ())]
)
def test_one_two_one(home, tmp_path, stage, more):
    """Two steps on one rank, two on two, two on one again, four pairs a step: the losses of one rank alone."""

    def job(name, world, steps):
        argv = ["--data", home.data, *NOISE, *TRAIN, *more, "--deepspeed", ROOT / "ds_configs" / f"{stage}.json"]
        argv += ["--output_dir", tmp_path / name, "--gradient_accumulation_steps", 4 // world]
        [did] = run_jobs(tmp_path / f"out-{name}-{world}-{steps}", world, [(name, "train_dpo", argv)]).values()
        assert [rank["error"] for rank in did] == [""] * world
        return [sorted(map(int, rank["items"])) for rank in did]

    def cut(step):
        shutil.rmtree(tmp_path / "moved" / "final", ignore_errors=True)
        for path in (tmp_path / "moved" / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)

    assert job("alone", 1, 6) == [[0, 1, 2, 3, 4, 5]]
    shutil.copytree(tmp_path / "alone", tmp_path / "moved")
    cut(2)
    assert job("moved", 2, 6) == [[2, 3, 4, 5]] * 2
    cut(4)
    assert job("moved", 1, 6) == [[4, 5]]
    alone, moved = log(tmp_path / "alone"), log(tmp_path / "moved")
    assert [line["step"] for line in moved] == [1, 2, 3, 4, 5, 6]
    for mine, want in zip(moved, alone):
        assert mine["loss"] == pytest.approx(want["loss"], abs=CLOSE) and mine["num_tokens"] == want["num_tokens"]
    assert not list((tmp_path / "moved" / "checkpoints").glob(".*"))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command(home, out, *more):
    """launch.sh on `home`'s model and 24 preferences, in words."""
    rows = (ROOT / "examples" / "prefs.jsonl").read_text().splitlines(keepends=True)[:24]
    (out / "prefs.jsonl").write_text("".join(rows))
    argv = ["--in", out / "prefs.jsonl", "--data", out / "packed", "--model_name_or_path", home.model]
    argv += [*NOISE, *TRAIN, "--output_dir", out / "run", *more]
    return ["bash", str(ROOT / "launch.sh"), str(ROOT / "ds_configs" / "zero3_offload_4080.json"), *last_of_each(argv)]


def launch(command, **variables):
    return subprocess.run(command, env=shell_environment(**variables), capture_output=True, text=True)


@pytest.mark.long
def test_two_launchers_and_a_host_file(home, tmp_path):
    """Two hosts, here loopback addresses, started by hand, and by HOSTFILE through ssh (a stand-in that runs it here).

    Both give the losses of one launcher with one rank.
    """
    for name in ("one", "two", "file"):
        (tmp_path / name).mkdir()
    one = launch(command(home, tmp_path / "one", "--gradient_accumulation_steps", 2))
    assert one.returncode == 0, one.stdout + one.stderr
    argv, port = command(home, tmp_path / "two", "--gradient_accumulation_steps", 1, "--num_gpus", 1), str(free_port())
    both = [
        subprocess.Popen(
            argv,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=shell_environment(NNODES="2", NODE_RANK=str(rank), MASTER_ADDR="127.0.0.2", MASTER_PORT=port),
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "the aligned model" in said[0] and "the aligned model" not in said[1]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text('#!/bin/bash\n[ "$1" = -tt ] && exec bash -c "$3"\n')
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("# two hosts\n127.0.0.3 slots=1\n127.0.0.4  slots=1 # the other\n\n")
    there = shell_environment(HOSTFILE=str(tmp_path / "hosts"), MASTER_PORT=str(free_port()))
    there["PATH"] = f"{tmp_path}/bin:{there['PATH']}"
    done = subprocess.run(
        command(home, tmp_path / "file", "--gradient_accumulation_steps", 1), env=there, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    want = log(tmp_path / "one" / "run")
    for name in ("two", "file"):
        got = log(tmp_path / name / "run")
        assert len(got) == len(want) == 6, name
        for mine, whole in zip(got, want):
            assert mine["loss"] == pytest.approx(whole["loss"], abs=CLOSE), name


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "names no host"),
        ("a b c\n", "'a b c', expected a line"),
        ("a slots=0\n", "slots=0"),
        ("a slots=1\nb slots=2\n", "expected the same on all"),
    ],
)
def test_host_file_refusals(home, tmp_path, text, words):
    (tmp_path / "hosts").write_text(text)
    done = launch(command(home, tmp_path), HOSTFILE=str(tmp_path / "hosts"))
    assert done.returncode == 2 and words in done.stderr and done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"NNODES": "2", "NODE_RANK": "2"}, "from 0"),
        ({"NNODES": "x"}, "NNODES is 'x'"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_host_refusals(home, tmp_path, values, words):
    done = launch(command(home, tmp_path), **values)
    assert done.returncode == 2 and words in done.stderr
