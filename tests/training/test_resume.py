"""Tests of training/resume.py without an engine: a conversion for another number of ranks that fails.

bash tests/run.sh tests/training/test_resume.py
"""

from pathlib import Path
from types import SimpleNamespace

import pytest

from files import InputError
from training import resume

NO_ROOM = 'Traceback (most recent call last):\n  File "x.py", line 1\nOSError: [Errno 28] No space left on device: '
FAULT = "Traceback (most recent call last):\nKeyError: 'param_shapes'\n"


@pytest.fixture
def job():
    ranks = SimpleNamespace(world=1, first=True)
    return SimpleNamespace(
        ranks=ranks, policy=SimpleNamespace(zero_optimization_stage=lambda: 3, _config=SimpleNamespace())
    )


def converting(monkeypatch, code, said):
    """In place of DeepSpeed's script: write half of a copy, then end with an exit code and a message."""

    def run(command, **_):
        copy = Path(command[command.index("--output_folder") + 1])
        (copy / "zero").mkdir(parents=True)
        (copy / "zero" / "half").write_text("half")
        return SimpleNamespace(returncode=code, stderr=said)

    monkeypatch.setattr(resume.subprocess, "run", run)
    monkeypatch.setattr(resume.dist, "barrier", lambda: None)


@pytest.mark.parametrize(
    "said, words",
    [
        (
            NO_ROOM,
            [
                ".step-2.universal: cannot be written",
                "(the disk is full: OSError: [Errno 28] No space left",
                "step-2 is complete. Free some disk",
            ],
        ),
        (FAULT, ["step-2: cannot be converted for 1 rank(s) (KeyError: 'param_shapes'); resume on 2"]),
    ],
)
def test_a_conversion_that_fails_leaves_no_copy(job, tmp_path, monkeypatch, said, words):
    converting(monkeypatch, 1, said)
    with pytest.raises(InputError) as error, resume.for_this_world(job, tmp_path / "step-2", 2):
        pytest.fail("the checkpoint is not converted")
    assert all(word in str(error.value) for word in words) and error.value.local, error.value
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_the_copy_goes_when_it_is_loaded(job, tmp_path, monkeypatch, fails):
    """Also if it cannot be loaded; the engine's next checkpoint is an ordinary one."""
    converting(monkeypatch, 0, "")
    try:
        with resume.for_this_world(job, tmp_path / "step-2", 2) as copy:
            assert (copy / "zero" / "half").exists() and job.policy._config.load_universal_checkpoint
            if fails:
                raise KeyError("a tensor")
    except KeyError:
        assert fails
    assert not list(tmp_path.iterdir()) and not job.policy._config.load_universal_checkpoint


def test_the_same_world_needs_no_copy(job, tmp_path):
    for world, stage in ((1, 3), (2, 0)):
        job.policy.zero_optimization_stage = lambda stage=stage: stage
        with resume.for_this_world(job, tmp_path / "step-2", world) as path:
            assert path == tmp_path / "step-2"
