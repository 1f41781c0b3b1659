"""A base model in 4 bits for LoRA's adapters: bitsandbytes' NF4 with doubly quantized scales (QLoRA, arXiv 2305.14314).

    train_dpo.py --load_in_4bit true --lora_r 16 ... -> 8B of weights on a 16 GB card, nothing streamed

The linear layers of the blocks are quantized one by one while the model is loaded, so memory never holds all of them in
16 bits. Of experts it is a stack of one layer (gate, up or down), which a forward or backward pass unpacks whole, one
stack at a time. Embedding, norms, routers and head keep their dtype. The reference is the quantized base, too: score.py
takes the same flag, and the first margin is 0.
"""

import logging

import torch

from files import InputError
from models import architecture
from models.experts import ExpertLinear

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: its code, a byte for the scale of 64, a float32 for 256 of those


def check(model_args, ds):
    """Refuse to train quantized weights, and to partition them."""
    if model_args.load_in_4bit and not model_args.lora_r:
        raise InputError(
            "--load_in_4bit: weights in 4 bits cannot be trained; add --lora_r 16 to train adapters, or leave it out"
        )
    refuse_zero3(model_args.load_in_4bit, ds)


def refuse_zero3(load_in_4bit, ds):
    if load_in_4bit and ds["zero_optimization"]["stage"] == 3:
        raise InputError(
            "--load_in_4bit: ZeRO-3 cannot partition 4-bit weights, which fit the card anyway; give "
            "ds_configs/zero0.json (or zero2_offload_4080.json)"
        )


class PackedExpertLinear(ExpertLinear):
    """A linear layer of every expert in 4 bits; its matrices are unpacked each time that they are read."""

    def matrices(self):
        from bitsandbytes import functional

        return functional.dequantize_4bit(self.weight, self.weight.quant_state)  # (E, out, in)


def prepare(model, dtype):
    """Replace each linear layer of the blocks by one that computes in `dtype` and that pack() quantizes."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns of kernels that are missing there
    try:
        from bitsandbytes import nn as bnb
    except ImportError:
        raise InputError("--load_in_4bit needs bitsandbytes; run: pip install -r requirements-4bit.txt") from None
    for name in architecture.block_linears(model):
        parent, _, leaf = name.rpartition(".")
        old = model.get_submodule(name)
        has_bias = old.bias is not None
        new = bnb.Linear4bit(
            old.in_features, old.out_features, has_bias, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        new.weight = bnb.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.bias = old.bias
        new.support_avx512bf16_for_cpu = False  # on a CPU, sampling computes as training does, for any number of rows
        setattr(model.get_submodule(parent), leaf, new)
    for module in model.modules():
        if isinstance(module, ExpertLinear):
            module.weight = bnb.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            module.__class__ = PackedExpertLinear


def pack(parameter):
    """Quantize a filled weight of prepare(), on the card where there is one. Other parameters stay unchanged."""
    if hasattr(parameter, "bnb_quantized"):
        parameter.to(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu")


def numel(parameter):
    """Elements of a parameter, also when ZeRO-3 has partitioned it or pack() has quantized it."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state else getattr(parameter, "ds_numel", parameter.numel())
