"""Tests of quantized.py: 4-bit bases through the engine, against plain torch on the unpacked weights.

bash tests/run.sh tests/models/test_quantized.py        # skipped without requirements-4bit.txt
"""

import math
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from small import ADAPTER_LENGTHS, ADAPTER_RUN, call, ds_config, flags, log, make_home, refusal, run_jobs

import generate
import train_dpo
from files import InputError
from models import architecture, checkpoint, lora, quantized

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="no bitsandbytes: pip install -r requirements-4bit.txt"
)
STAGES = ("zero0", "zero2_offload_4080")
RUN = flags(**ADAPTER_RUN, load_in_4bit="true")


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("quantized"), tiny_dir, ADAPTER_LENGTHS, 5)


@pytest.fixture(scope="module")
def trained(home):
    """Three steps in each stage, and the third once more, from the checkpoint of the second; two in bf16."""
    base, first, rest = ["--data", home.data] + RUN, [], []
    for stage in STAGES:
        argv = (
            base
            + ["--deepspeed", ds_config(home.folder / f"{stage}.json", stage, eps=1e-3)]
            + flags(output_dir=home.folder / stage, save_steps=2)
        )
        first.append((stage, "train_dpo", argv))
        rest.append((f"{stage}-rest", "train_dpo", argv))
    low_score = base + flags(use_mixed_precision="bf16")
    low = low_score + flags(max_steps=2, deepspeed=home.folder / "zero0.json", output_dir=home.folder / "low")
    scores = [("score", "score", base), ("score-low", "score", low_score)]
    did = run_jobs(home.folder / "out", None, [*scores, *first, ("low", "train_dpo", low)])
    for stage in STAGES:
        shutil.move(home.folder / stage / "final", home.folder / f"{stage}-final")
    did |= run_jobs(home.folder / "out", None, rest)
    assert [(name, rank["error"]) for name, ranks in did.items() for rank in ranks if rank["error"]] == []
    return home.folder


def unpacked(model_dir):
    """A plain model whose blocks' weights are what 4 bits leave of them."""
    import bitsandbytes.functional as F

    model = checkpoint.load_model(str(model_dir), torch.float32)
    for name in architecture.block_linears(model):
        weight = model.get_submodule(name).weight
        weight.data = F.dequantize_4bit(*F.quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@needs_bitsandbytes
def test_forward(home):
    """The 4-bit model is the plain one on the unpacked weights; embedding and head are not quantized."""
    ids = torch.randint(4, 500, (2, 19), generator=torch.Generator().manual_seed(0))
    model, plain = checkpoint.load_model(str(home.model), torch.float32, load_in_4bit=True), unpacked(home.model)
    assert (logits(model, ids) - logits(plain, ids)).abs().max() < 1e-5
    assert (logits(model, ids) - logits(checkpoint.load_model(str(home.model), torch.float32), ids)).abs().max() > 1e-3
    packed = [parameter for parameter in model.parameters() if parameter.dtype == torch.uint8]
    assert len(packed) == 14 and sum(map(quantized.numel, packed)) == 2 * sum(map(torch.Tensor.numel, packed))
    assert sum(map(quantized.numel, model.parameters())) == sum(map(torch.Tensor.numel, plain.parameters()))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} >= {
        "model.transformer.wte.weight",
        "model.transformer.ff_out.weight",
    }


@needs_bitsandbytes
def test_bytes():
    """quantized.BYTES, which plan.py counts with, is what a large weight really keeps."""
    import bitsandbytes.functional as F

    codes, state = F.quantize_4bit(torch.randn(1024, 1024), quant_type="nf4", compress_statistics=True)
    kept = codes.numel() + state.absmax.numel() * state.absmax.element_size() + 4 * state.state2.absmax.numel()
    assert kept / 2**20 == pytest.approx(quantized.BYTES, rel=1e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("stage", STAGES)
def test_training(trained, stage):
    """Margin 0 at first; adapters alone are trained and saved; both stages and a resumed run end alike."""
    lines = log(trained / stage)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert abs(lines[0]["rewards/margins"]) < 1e-4 and lines[2]["loss"] < math.log(2)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    first, resumed, other = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (trained / f"{stage}-final", trained / stage / "final", trained / f"{STAGES[0]}-final")
    )
    assert first.keys() == resumed.keys() and len(first) == 2 * 2 * 7
    assert all(torch.equal(first[name], resumed[name]) for name in first)
    assert all(torch.allclose(first[name], other[name], atol=1e-5) for name in first)


@needs_bitsandbytes
def test_bf16(trained):
    lines = log(trained / "low")
    assert abs(lines[0]["rewards/margins"]) < 0.05 and lines[1]["loss"] != lines[0]["loss"]
    tensors = load_file(trained / "low" / "final" / "adapter_model.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in tensors.values())


@needs_bitsandbytes
def test_the_trained_policy_is_what_is_loaded(home, trained, capsys):
    """The adapter is loaded beside the 4-bit base: merged and quantized again, most of it would be lost."""
    adapter, ids = trained / "zero0-final", torch.randint(4, 500, (2, 19), generator=torch.Generator().manual_seed(0))
    loaded, plain = checkpoint.load_model(str(adapter), torch.float32, load_in_4bit=True), unpacked(home.model)
    base = logits(plain, ids)
    lora.merge(plain, adapter)
    want = logits(plain, ids)
    assert (logits(loaded, ids) - want).abs().max() < 1e-5 < 1e-2 < (want - base).abs().max()
    call(
        generate.main,
        *flags(model=adapter, prompt="7 + 5 =", gen_length=8, use_mixed_precision="no", load_in_4bit="true"),
    )
    assert capsys.readouterr().out.endswith("\n")


@needs_bitsandbytes
def test_refusals(home, trained, capsys, tmp_path):
    run = ["--data", home.data, *RUN, "--output_dir", tmp_path / "run"]
    said = refusal(train_dpo.main, capsys, *run, "--lora_r", 0)
    assert "--load_in_4bit" in said and "--lora_r 16" in said
    zero3 = ds_config(tmp_path / "zero3.json", "zero3_offload_4080")
    assert "ds_configs/zero0.json" in refusal(train_dpo.main, capsys, *run, "--deepspeed", zero3)
    said = refusal(train_dpo.main, capsys, *run, "--load_in_4bit", "false")  # the scores are a 4-bit reference's
    assert "load_in_4bit is True there and False in this run" in said
    pytest.raises(InputError, checkpoint.load_model, str(home.folder / "nowhere"), torch.float32, load_in_4bit=True)


def test_without_bitsandbytes(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    error = pytest.raises(InputError, checkpoint.load_model, str(home.model), torch.float32, load_in_4bit=True).value
    assert "pip install -r requirements-4bit.txt" in str(error)
