"""Tests of training/runs.py: what a run's folder holds after any way of stopping.

bash tests/run.sh tests/training/test_runs.py
"""

import hashlib
import json
import os
import shutil
import subprocess

import pytest
from originals import refused

from training import runs
from training.runs import Run

ARGUMENTS = {
    "beta": 0.1,
    "learning_rate": 1e-6,
    "seed": 42,
    "save_steps": 10,
    "output_dir": "runs/a",
    "deepspeed": None,
    "model_name_or_path": "org/model",
}
INPUTS = {"data": "d", "model": "m"}


@pytest.fixture
def run(tmp_path):
    got = Run(tmp_path / "run")
    got.begin(ARGUMENTS, INPUTS, {"torch": "2"}, 9)
    return got


def write_checkpoint(run, step, limit=0):
    """What train_dpo does: write under the temporary name, then keep."""
    work = run.checkpoints / run.temporary(step)
    work.mkdir(parents=True)
    (work / "weights").write_text(f"weights {step}")
    run.keep(step, {"step": step}, limit)


def steps(run):
    return [step for step, _ in run.saved()]


# --- the same run? ----------------------------------------------------------------------------------------


def test_begin(run, monkeypatch):
    got = json.loads((run.folder / "run.json").read_text())
    assert got["arguments"] == ARGUMENTS and got["inputs"] == INPUTS and got["versions"]["torch"] == "2"
    assert {"git_commit", "command", "steps", "starts"} <= set(got) and "python" in got["versions"]
    run.check_same(ARGUMENTS, INPUTS)
    assert got["start_is_folder"] is False  # a name of the hub
    run.begin(ARGUMENTS | {"model_name_or_path": str(run.folder)}, INPUTS, {}, 9)
    assert json.loads((run.folder / "run.json").read_text())["start_is_folder"] is True


def test_starts_of_a_resumed_run(run):
    run.begin(ARGUMENTS, INPUTS, {}, 9, start=4)
    run.begin(ARGUMENTS, INPUTS, {}, 9, start=6)
    record = json.loads((run.folder / "run.json").read_text())
    assert record["steps"] == 9 and [each["after_step"] for each in record["starts"]] == [0, 4, 6]
    run.begin(ARGUMENTS, INPUTS, {}, 9)  # anew
    assert len(json.loads((run.folder / "run.json").read_text())["starts"]) == 1


def test_no_home_in_run_json(tmp_path, monkeypatch):
    """The user's folder is written as ~, found again, and does not keep the run from resuming."""
    monkeypatch.setenv("HOME", str(tmp_path / "anna"))
    monkeypatch.setattr(
        "sys.argv",
        ["train_dpo.py", f"--data={tmp_path}/anna/packed", "--columns", f"a=x,b={tmp_path}/anna", "--beta", "0.1"],
    )
    got, folder = Run(tmp_path / "anna" / "runs" / "a"), tmp_path / "anna" / "packed"
    arguments = ARGUMENTS | {
        "data": str(folder),
        "output_dir": str(got.folder),
        "model_name_or_path": str(tmp_path / "annabel"),
        "columns": str(folder),
    }
    got.begin(arguments, INPUTS, {}, 9)
    text = (got.folder / "run.json").read_text()
    assert f"{tmp_path}/anna/" not in text and f"{tmp_path}/annabel" in text
    record = json.loads(text)
    assert record["command"] == ["python", "train_dpo.py", "--data=~/packed", "--columns", "a=x,b=~", "--beta", "0.1"]
    assert runs.places(got.folder, record, "data") == [got.folder / "../../packed", folder]
    write_checkpoint(got, 1)
    got.check_same(arguments, INPUTS)
    monkeypatch.setenv("HOME", "/")
    assert runs.without_home({"a": ["/x", 1, None, "a=/b"]}) == {"a": ["/x", 1, None, "a=/b"]}


def test_begin_clears_what_a_killed_save_left(run):
    (run.checkpoints / run.temporary(7)).mkdir()
    (run.checkpoints / ".step-3.old").mkdir()
    write_checkpoint(run, 4)
    run.begin(ARGUMENTS, INPUTS, {}, 9)
    assert os.listdir(run.checkpoints) == ["step-4"]


def test_new_folder_is_free(tmp_path):
    Run(tmp_path / "nothing").check_same(ARGUMENTS, INPUTS)
    assert Run(tmp_path / "nothing").start_from(None) is None and not Run(tmp_path / "nothing").finished


@pytest.mark.parametrize(
    "change, inputs, words",
    [
        ({"beta": 0.2}, {}, ["beta = 0.1, this one 0.2"]),
        ({"seed": 1}, {}, ["seed = 42, this one 1"]),
        ({"new_flag": 1}, {}, ["new_flag = None, this one 1"]),
        ({}, {"data": "e"}, ["data = d, this one e"]),
        ({}, {"model": "n"}, ["model = m, this one n"]),
    ],
)
def test_other_run_is_refused(run, change, inputs, words):
    run.check_same(ARGUMENTS | change, INPUTS | inputs)  # nothing saved yet: nothing to mix up
    write_checkpoint(run, 3)
    refused(lambda: run.check_same(ARGUMENTS | change, INPUTS | inputs), str(run.folder), "--output_dir", *words)


def test_an_argument_that_is_newer_than_the_run(run):
    """A run that an older version began can be resumed, with the default alone."""
    write_checkpoint(run, 3)
    assert "simpo_gamma" not in ARGUMENTS
    run.check_same(ARGUMENTS | {"simpo_gamma": 0.5}, INPUTS)
    refused(lambda: run.check_same(ARGUMENTS | {"simpo_gamma": 0.4}, INPUTS), "simpo_gamma = 0.5, this one 0.4")


def test_free_arguments(run):
    """Where things are, how often it prints, how work is divided: these may differ. Every one is a real argument."""
    from dataclasses import fields

    import config

    assert runs.FREE - {"ranks"} <= {item.name for group in config.GROUPS for item in fields(group)}
    write_checkpoint(run, 3)
    run.check_same(ARGUMENTS | dict.fromkeys(runs.FREE - {"ranks"}, "other"), INPUTS)
    assert not runs.FREE & {
        "beta",
        "learning_rate",
        "seed",
        "noise_seed",
        "diffusion_steps",
        "trajectories",
        "loss_type",
        "use_mixed_precision",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    }


def test_another_number_of_ranks(tmp_path):
    """As many micro-batches a step in all, or refused with what to give."""
    run, steps = Run(tmp_path / "run"), "gradient_accumulation_steps"
    run.begin(ARGUMENTS | {"ranks": 2, steps: 4}, INPUTS, {}, 9)
    write_checkpoint(run, 3)
    for ranks, accumulated in ((2, 4), (1, 8), (4, 2), (8, 1)):
        run.check_same(ARGUMENTS | {"ranks": ranks, steps: accumulated}, INPUTS)
    refused(lambda: run.check_same(ARGUMENTS | {"ranks": 1, steps: 4}, INPUTS), "another batch", f"--{steps} 8")
    refused(lambda: run.check_same(ARGUMENTS | {"ranks": 3, steps: 4}, INPUTS), "ranks that divide 8")
    refused(lambda: run.check_same(ARGUMENTS | {"ranks": 2, steps: 8}, INPUTS), f"{steps} = 4")


def test_torn_run_json(run):
    write_checkpoint(run, 3)
    os.truncate(run.folder / "run.json", 10)
    refused(lambda: run.check_same(ARGUMENTS, INPUTS), "run.json")


def test_finished(run):
    assert not run.finished
    run.final.mkdir()
    assert not run.finished
    (run.final / "config.json").write_text("{}")
    assert run.finished


# --- checkpoints ------------------------------------------------------------------------------------------


def test_newest_is_found_by_number(run):
    for step in (9, 100, 20):
        write_checkpoint(run, step)
    assert steps(run) == [9, 20, 100]
    assert run.start_from(None) == run.start_from("latest") == run.checkpoints / "step-100"
    assert run.start_from(str(run.checkpoints / "step-20")) == run.checkpoints / "step-20"
    state = json.loads((run.checkpoints / "step-20" / "state.json").read_text())
    assert state.pop("digest") and state == {
        "step": 20,
        "files": {"weights": [10, hashlib.sha256(b"weights 20").hexdigest()]},
    }
    assert (run.checkpoints / "step-20" / "weights").read_text() == "weights 20"


def test_no_checkpoint(run):
    assert run.start_from(None) is None
    refused(lambda: run.start_from("latest"), "--resume_from_checkpoint latest", "no checkpoint")
    refused(lambda: run.start_from("elsewhere"), "--resume_from_checkpoint elsewhere", "there are: none")
    write_checkpoint(run, 3)
    (run.checkpoints / "step-4").mkdir()
    refused(lambda: run.start_from(str(run.checkpoints / "step-4")), "step-4: not a checkpoint", "step-3")


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: (path / "weights").write_bytes(b"Weights 3"),
        lambda path: (path / "weights").write_bytes(b"weights"),
        lambda path: (path / "weights").unlink(),
        lambda path: (path / "state.json").write_text('{"step": 3'),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: (path / "state.json").write_text('{"step": 3}'),
        lambda path: (path / "state.json").write_text('{"files": {"weights": 3}}'),
        lambda path: (path / "state.json").write_bytes(b"\xff"),
    ],
)
def test_a_torn_checkpoint_is_skipped(run, capsys, harm):
    """The newest complete one is taken, with a message. A torn one by name, or torn ones alone, are refused."""
    for step in (1, 2, 3):
        write_checkpoint(run, step)
    path = run.checkpoints / "step-3"
    harm(path)
    assert run.start_from(None) == run.start_from("latest") == run.checkpoints / "step-2"
    assert f"{path}: " in capsys.readouterr().err
    refused(lambda: run.start_from(str(path)), f"--resume_from_checkpoint {path}: ", "newest complete one")
    for step in (1, 2):
        shutil.rmtree(run.checkpoints / f"step-{step}")
    refused(lambda: run.start_from(None), "none of its 1 checkpoint(s) is complete")


def test_a_checkpoint_from_elsewhere_is_not_unpickled(run, tmp_path):
    """Even a complete one is trusted only where this project wrote it, or where its user puts it."""
    write_checkpoint(run, 2)
    other = shutil.copytree(run.checkpoints / "step-2", tmp_path / "download" / "step-2")
    refused(lambda: run.start_from(str(other)), str(other), "pickles", "copy it there", str(run.checkpoints))
    (tmp_path / "link").symlink_to(run.folder)  # the same folder by another name
    assert run.start_from(str(tmp_path / "link" / "checkpoints" / "step-2")).samefile(run.checkpoints / "step-2")


def test_unfinished_is_never_found(run):
    """Killed while writing, before state.json, or while an old one was being removed."""
    write_checkpoint(run, 1)
    work = run.checkpoints / run.temporary(2)
    work.mkdir()
    (work / "state.json").write_text("{}")  # killed just before the rename
    (run.checkpoints / "step-3").mkdir()
    (run.checkpoints / ".step-4.old").mkdir()
    (run.checkpoints / ".step-4.old" / "state.json").write_text("{}")
    (run.checkpoints / "step-x").mkdir()
    (run.checkpoints / "step-x" / "state.json").write_text("{}")
    assert steps(run) == [1] and run.start_from("latest") == run.checkpoints / "step-1"


def test_state_comes_before_the_rename(run, monkeypatch):
    """Killed at the rename: nothing new counts, and the same step can be written again."""
    write_checkpoint(run, 1)
    replace = os.replace

    def killed(a, b):
        if str(b).endswith("step-2"):
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(run, 2)
    assert steps(run) == [1]
    monkeypatch.setattr(os, "replace", replace)
    shutil.rmtree(run.checkpoints / run.temporary(2))
    write_checkpoint(run, 2)
    assert steps(run) == [1, 2]


@pytest.mark.parametrize(
    "limit, left", [(0, [1, 2, 3, 4]), (-1, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])]
)
def test_rotation(run, limit, left):
    for step in (1, 2, 3, 4):
        write_checkpoint(run, step, limit)
    assert steps(run) == left
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"step-{step}" for step in left]


def test_rotation_killed(run, monkeypatch):
    """A half-deleted checkpoint is not one."""
    for step in (1, 2):
        write_checkpoint(run, step)

    def half(path, **_):
        if "old" in path.name:
            (path / "weights").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", half)
        write_checkpoint(run, 3, limit=2)
    assert steps(run) == [2, 3] and all((path / "weights").exists() for _, path in run.saved())


def test_kept_again(run):
    write_checkpoint(run, 1)
    work = run.checkpoints / run.temporary(1)
    work.mkdir()
    run.keep(1, {"again": True}, 0)
    assert not list(run.checkpoints.glob(".*"))
    assert os.listdir(run.checkpoints / "step-1") == ["state.json"] and steps(run) == [1]


# --- the log ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "torn", ["", '{"step": 4, "lo', '{"step": 4', '{"st', "{", "\x00\x00", '{"loss": 1}\n', "\udcff"]
)
@pytest.mark.parametrize("step, left", [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])])
@pytest.mark.parametrize("name", ["log", "scores", "skipped"])
def test_cut_log(run, name, torn, step, left):
    path = getattr(run, f"{name}_path")
    run.add(path, [{"step": number, "loss": 0.5} for number in (1, 2, 3)])
    with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(torn)
    run.cut_log(step)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": n, "loss": 0.5} for n in left]
    run.add(path, [{"step": 10}])
    assert path.read_text().endswith('\n{"step": 10}\n' if left else '{"step": 10}\n')
    assert sorted(path.name for path in run.folder.iterdir()) == sorted(["checkpoints", f"{name}.jsonl", "run.json"])


def test_cut_log_where_an_evaluation_is_pending(run):
    """A resumed run made it and was killed before it saved: its line and held-out scores are not there twice then."""
    run.add(run.log_path, [{"step": 3}, {"step": 4}, {"step": 5}])
    run.add(run.scores_path, [{"step": step, "split": split} for step in (4, 5) for split in ("train", "eval")])
    run.cut_log(4, pending=True)
    assert run.log_path.read_text() == '{"step": 3}\n'
    assert [json.loads(line) for line in run.scores_path.read_text().splitlines()] == [{"step": 4, "split": "train"}]


def test_later_checkpoints_go_with_the_log(run, capsys):
    """On resume from an earlier checkpoint: resuming from a later one then would leave a gap in the log."""
    for step in (2, 4, 6):
        write_checkpoint(run, step)
    run.cut_log(4)
    assert steps(run) == [2, 4] and "step-6: its steps will be made again; removed" in capsys.readouterr().out


def test_cut_log_that_lacks_its_last_newline(run):
    run.log_path.write_text('{"step": 1}\n{"step": 2}')
    run.cut_log(5)
    run.add(run.log_path, [{"step": 3}])
    assert [json.loads(line)["step"] for line in run.log_path.read_text().splitlines()] == [1, 2, 3]


def test_cut_no_log(run):
    run.cut_log(5)
    assert not run.log_path.exists()


# --- the commit -------------------------------------------------------------------------------------------


def test_git_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "training" / "runs.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.git_commit() is None

    def git(*words):
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "first", "--no-verify")
    commit = git("rev-parse", "HEAD")
    assert runs.git_commit() == commit
    (tmp_path / "a").write_text("2")
    assert runs.git_commit() == commit + "-dirty"
