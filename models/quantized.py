"""A base model in 4 bits: NF4 with doubly quantized scales, by bitsandbytes (QLoRA, arXiv 2305.14314), beside LoRA's adapters.

    train_dpo.py --load_in_4bit true --lora_r 16 ... -> 8B of weights on a 16 GB card, nothing streamed

The linear layers of the blocks are packed one by one while the model is loaded, so that they are never whole at once; embedding,
norms and head keep their dtype. The reference is the packed base too: score.py takes the same flag, and the first margin is 0.
"""

import logging

import torch

from files import InputError
from models import architecture

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: its code, a byte for the scale of 64, a float32 for 256 of those


def check(model_args, ds):
    """Refuse to train what is packed, or to cut it."""
    if model_args.load_in_4bit and not model_args.lora_r:
        raise InputError(
            "--load_in_4bit: weights in 4 bits cannot be trained; add --lora_r 16, whose adapters are, or leave it out"
        )
    refuse_zero3(model_args.load_in_4bit, ds)


def refuse_zero3(load_in_4bit, ds):
    if load_in_4bit and ds["zero_optimization"]["stage"] == 3:
        raise InputError(
            "--load_in_4bit: ZeRO-3 cannot cut 4-bit weights, which fit the card as they are; give ds_configs/zero0.json "
            "(or zero2_offload_4080.json)"
        )


def prepare(model, dtype):
    """Replace each linear layer of the blocks by one that computes in `dtype` and whose weight is packed once it is filled."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it tells of kernels that it could have had
    try:
        import bitsandbytes
    except ImportError:
        raise InputError("--load_in_4bit needs bitsandbytes; run: pip install -r requirements-4bit.txt") from None
    for name in architecture.block_linears(model):
        parent, _, leaf = name.rpartition(".")
        old = model.get_submodule(name)
        new = bitsandbytes.nn.Linear4bit(
            old.in_features,
            old.out_features,
            old.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.bias = old.bias
        new.support_avx512bf16_for_cpu = False  # sampling on a CPU computes as training does, and in any width
        setattr(model.get_submodule(parent), leaf, new)
    model.is_loaded_in_4bit = True  # peft looks here


def pack(parameter):
    """Quantize a weight of prepare(), now that it is filled; on the card where there is one. Others stay as they are."""
    if hasattr(parameter, "bnb_quantized"):
        parameter.to(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu")


def numel(parameter):
    """Elements of a parameter, whether ZeRO-3 has cut it or it is packed."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state else getattr(parameter, "ds_numel", parameter.numel())
