"""Tests of smdm.py and convert.py: the tensor map in both directions, bit for bit.

bash tests/run.sh tests/models/test_smdm.py
"""

import functools

import pytest
import torch
from originals import SMDM_HEADS, make_smdm, refused
from safetensors.torch import load_file, save_file

import convert
from models import checkpoint, smdm


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(path of an original file, its tensors)"""
    path = tmp_path_factory.mktemp("smdm") / "mdm.safetensors"
    return path, make_smdm(path)


def test_both_directions(original, tiny_dir, tmp_path):
    """Original -> folder -> original, bit for bit, into folders that do not exist yet."""
    path, tensors = original
    folder, back = tmp_path / "weights" / "smdm", tmp_path / "new" / "back.safetensors"
    convert.main([str(path), str(folder), "--tokenizer", str(tiny_dir), "--n_heads", str(SMDM_HEADS)])
    convert.main([str(folder), str(back)])
    got = load_file(back)
    assert got.keys() == tensors.keys() and all(torch.equal(got[name], tensors[name]) for name in got)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lm_head.weight": None}, ["lm_head.weight", "missing"]),
        ({"strange.weight": torch.zeros(1)}, ["strange.weight"]),
        ({"transformer.h.1.norm_1.weight": torch.zeros(3)}, ["attn_norm", "shape"]),
    ],
)
def test_wrong_tensor(original, tiny_dir, tmp_path, change, words):
    tensors = {name: tensor for name, tensor in (original[1] | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "bad.safetensors")
    refused(lambda: convert.from_smdm(tmp_path / "bad.safetensors", tmp_path / "no", tiny_dir, SMDM_HEADS), *words)
    assert not (tmp_path / "no").exists()


def test_refusals(original, tiny_dir, tmp_path):
    """A torn file, no tokenizer, a width that no released model has, a file where a model folder is expected."""
    path, tensors = original
    (tmp_path / "torn.safetensors").write_bytes(path.read_bytes()[:-100])
    for source, tokenizer, words in (
        (tmp_path / "torn.safetensors", tiny_dir, ["torn.safetensors", "download it again"]),
        (path, tmp_path / "nowhere", ["--tokenizer", "nowhere"]),
    ):
        convert_it = functools.partial(convert.from_smdm, source, tmp_path / "no", str(tokenizer), SMDM_HEADS)
        refused(convert_it, *words)
    assert not (tmp_path / "no").exists()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    refused(lambda: smdm.config_of(shapes), "--n_heads")
    refused(lambda: checkpoint.load_model(str(path), torch.float32), "convert.py")


def test_released_smdm():
    """The released 1028M: its heads from the width, its parameters as counted on the original."""
    shapes = {
        "transformer.wte.weight": (32001, 1792),
        "lm_head.weight": (32000, 1792),
        "transformer.h.0.mlp.swiglu.w1.weight": (7168, 1792),
    }
    config = smdm.config_of(shapes | {f"transformer.h.{i}.norm_1.weight": (1792,) for i in range(20)})
    with torch.device("meta"):
        model = smdm.SMDMModelLM(config)
    assert (config.n_heads, config.mask_token_id) == (14, 32000)
    assert sum(value.numel() for value in model.parameters()) == 1142367744
