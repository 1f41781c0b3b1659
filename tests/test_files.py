"""Tests of files.py: an output is tried before the work is done.

bash tests/run.sh tests/test_files.py
"""

import errno

import pytest
from small import refusal

import convert
import files
import merge


def refuse_to_create(**options):
    raise PermissionError(errno.EACCES, "Permission denied", options["dir"])


@pytest.mark.parametrize("command", [merge, convert])
def test_an_output_that_cannot_be_written(monkeypatch, tmp_path, capsys, command):
    """It exists, a file stands where a folder is needed, or the folder is not the user's. No work begins."""
    (tmp_path / "file").write_text("kept")
    for out, reason in (
        (tmp_path / "file", "exists already"),
        (tmp_path / "file" / "model", "cannot be written (Not a directory"),
        (tmp_path / "file" / "deep" / "model", "cannot be written (Not a directory"),
    ):
        assert refusal(command.main, capsys, "nowhere", out).startswith(f"error: {out}: {reason}")
    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse_to_create)
    said = refusal(command.main, capsys, "nowhere", tmp_path / "weights" / "model")
    assert f"model: cannot be written (Permission denied: {tmp_path})" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_check_new_makes_nothing(tmp_path):
    files.check_new(tmp_path / "weights" / "model")
    assert not list(tmp_path.iterdir())
