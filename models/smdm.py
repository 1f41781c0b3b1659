"""SMDM's tensor map: the names in its original files and ours, in both directions, and its head, one row short.

    python convert.py mdm-1028M-1600e18.safetensors weights/smdm-1028M --tokenizer TinyLlama/TinyLlama_v1.1
    python convert.py runs/smdm/final mdm-1028M-dpo.safetensors

Source: ML-GSAI/SMDM, arXiv 2410.18514. The blocks are LLaDA's. OUTER, INNER and the packed attn.attn below are the map;
from_original() and to_original() apply it.

An original is one .safetensors file without a config; the shapes in it determine all but the number of heads. Its
query, key and value are packed head by head: [q k v] of the first head, then of the second, ... The embedding has one
row more than the head, for the mask. Cosines and sines of the rotation are rounded to bfloat16, as the original's are.
"""

import re

import torch

from files import InputError
from models.llada import LLaDAConfig, LLaDAModelLM, rotary

OUTER = {  # the original's name: ours
    "transformer.wte.weight": "model.transformer.wte.weight",
    "transformer.ln_f.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
INNER = {  # the same inside a block: transformer.h.N.*.weight and model.transformer.blocks.N.*.weight
    "norm_1": "attn_norm",
    "norm_2": "ff_norm",
    "attn.proj": "attn_out",
    "mlp.swiglu.w1": "ff_proj",
    "mlp.swiglu.w2": "up_proj",
    "mlp.swiglu.w3": "ff_out",
}
PACKED, PARTS = "attn.attn", ("q_proj", "k_proj", "v_proj")  # one tensor of the original, three of ours
# Heads by width, from SMDM's table of configurations, where all models of that width have the same number.
HEADS = {256: 4, 384: 6, 512: 8, 576: 9, 768: 12, 896: 14, 1024: 16, 1280: 10, 1408: 11, 1536: 12, 1792: 14, 2048: 16}


class SMDMConfig(LLaDAConfig):
    model_type = "smdm"
    head_size: int | None = None  # rows of the head: the vocabulary without the mask

    @property
    def head_rows(self):
        return self.head_size or self.rows


class SMDMModelLM(LLaDAModelLM):
    config_class = SMDMConfig

    def rotary(self, length, device):
        tables = rotary(length, self.config.d_model // self.config.n_heads, self.config.rope_theta, device)
        return tuple(table.bfloat16().float() for table in tables)


def config_of(shapes, heads=None):
    """The SMDMConfig of an original file's {tensor name: shape}.

    heads: needed for a width that SMDM has no model of. Raises InputError if that or a tensor is missing.
    """
    try:
        words, D = shapes["transformer.wte.weight"]
        head_size = shapes["lm_head.weight"][0]
        hidden = shapes["transformer.h.0.mlp.swiglu.w1.weight"][0]
    except KeyError as error:
        raise InputError(f"not an SMDM checkpoint: tensor {error.args[0]} is missing") from None
    layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.h.")}
    heads = heads or HEADS.get(D)
    if not heads or D % heads:
        raise InputError(f"an SMDM checkpoint of width {D}: its number of heads is not in the file; give --n_heads")
    return SMDMConfig(
        d_model=D,
        n_layers=len(layers),
        n_heads=heads,
        mlp_hidden_size=hidden,
        vocab_size=words,
        head_size=head_size,
        max_sequence_length=2048,
        rope_theta=10000.0,
        mask_token_id=words - 1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        architectures=["SMDMModelLM"],
    )


def from_original(tensors, heads):
    """{our name: tensor} of an original file's {name: tensor}. Raises InputError for a name that SMDM does not have."""
    found = {}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", name)
        block, inner = (f"model.transformer.blocks.{place[1]}", place[2]) if place else (None, None)
        if name in OUTER:
            found[OUTER[name]] = tensor
        elif inner in INNER:
            found[f"{block}.{INNER[inner]}.weight"] = tensor
        elif inner == PACKED:
            parts = tensor.view(heads, 3, -1, tensor.shape[1]).unbind(1)  # (heads, hd, D) each of q, k, v
            for ours, part in zip(PARTS, parts):
                found[f"{block}.{ours}.weight"] = part.reshape(-1, tensor.shape[1]).contiguous()
        else:
            raise InputError(f"tensor {name} is not part of SMDM's architecture")
    return found


def to_original(tensors, heads):
    """{original name: tensor} of our {name: tensor}: the inverse of from_original()."""
    outer = {ours: original for original, ours in OUTER.items()}
    inner = {ours: original for original, ours in INNER.items()}
    found = {outer[name]: tensor for name, tensor in tensors.items() if name in outer}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(.+)\.weight", name)
        if place and place[2] in inner:
            found[f"transformer.h.{place[1]}.{inner[place[2]]}.weight"] = tensor
        elif place and place[2] == PARTS[0]:
            parts = [tensors[name.replace(PARTS[0], part)] for part in PARTS]
            packed = torch.stack([part.view(heads, -1, part.shape[1]) for part in parts], 1)  # (heads, 3, hd, D)
            found[f"transformer.h.{place[1]}.{PACKED}.weight"] = packed.reshape(-1, tensor.shape[1])
    return found
