"""Tests of pickled.py: weights of PyTorch's pickles become safetensors, code in them does not run.

bash tests/run.sh tests/models/test_pickled.py
"""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small import refusal

import convert
from models import checkpoint


@pytest.fixture
def bins(make_llada, tmp_path, tiny_dir):
    """A model folder of two pickles and their index, and its tensors; two names may share one memory."""
    _, tensors = make_llada(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:]), 1):
        torch.save(
            {name: tensors[name] for name in part}, tmp_path / "model" / f"pytorch_model-0000{number}-of-00002.bin"
        )
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {}}))
    for path in tiny_dir.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    return tmp_path / "model", tensors


def test_converted(bins, tmp_path, capsys):
    folder, tensors = bins
    said = refusal(lambda _: checkpoint.load_model(str(folder), torch.float32), capsys)
    assert f"python convert.py {folder} OUT --allow_pickle" in said
    assert convert.main([str(folder), str(tmp_path / "out"), "--allow_pickle"]) == 0
    model = checkpoint.load_model(str(tmp_path / "out"), torch.float32)
    assert {name for name, _ in model.named_parameters()} == set(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in model.named_parameters())
    assert not list((tmp_path / "out").glob("*.bin*")) and list((tmp_path / "out").glob("tokenizer*"))


def test_shared_and_strided_tensors(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"a": whole, "b": whole, "c": whole.T}, folder / "pytorch_model.bin")
    assert convert.main([str(folder), str(tmp_path / "out"), "--allow_pickle"]) == 0
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got["a"], whole) and torch.equal(got["b"], whole) and torch.equal(got["c"], whole.T)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("what", ["code", "torn", "empty", "list", "nothing"])
def test_refused(bins, tmp_path, capsys, what):
    """No code runs, no folder is left."""
    folder, _ = bins
    path = folder / "pytorch_model-00002-of-00002.bin"
    if what == "code":
        torch.save({"a": Evil(tmp_path / "ran")}, path)
    elif what == "torn":
        path.write_bytes(path.read_bytes()[:500])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "list":
        torch.save([torch.ones(2)], path)
    else:
        for each in folder.glob("*.bin"):
            each.unlink()
    said = refusal(convert.main, capsys, folder, tmp_path / "out", "--allow_pickle")
    assert str(folder) in said and not (tmp_path / "ran").exists() and not list(tmp_path.glob("*out*"))


def test_plain_pickle_with_code(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    refusal(convert.main, capsys, tmp_path / "model", tmp_path / "out", "--allow_pickle")
    assert not (tmp_path / "ran").exists()
