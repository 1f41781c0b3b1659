"""Tests of files.py: an output is tried before the work is done.

bash tests/run.sh tests/test_files.py
"""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file
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


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_the_umasks(tmp_path, umask, mode):
    """Of every file, also of safetensors, which are written as 0o600."""
    before = os.umask(umask)
    try:
        with files.replacing(tmp_path / "file") as file:
            file.write("x")
        with files.replacing_folder(tmp_path / "folder") as work:
            (work / "inside").mkdir(parents=True)
            save_file({"x": torch.zeros(1)}, work / "inside" / "model.safetensors")
    finally:
        assert os.umask(before) == umask
    for path in (tmp_path / "file", tmp_path / "folder" / "inside" / "model.safetensors"):
        assert path.stat().st_mode & 0o777 == mode, path
