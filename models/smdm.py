"""SMDM's models (ML-GSAI/SMDM, arXiv 2410.18514): LLaDA's blocks with another head, and their original files, both ways.

    python convert.py mdm-1028M-1600e18.safetensors weights/smdm-1028M --tokenizer TinyLlama/TinyLlama_v1.1
    python convert.py runs/smdm/final mdm-1028M-dpo.safetensors

The original is one .safetensors file without a config: its shapes tell all but the number of heads. Query, key and value are
packed head by head, [q k v] of the first, then of the second, ...; embedding has a row more than the head, the mask's.
The rotation's cosines and sines are rounded to bfloat16, as the original stores them.
"""

import re

import torch

from files import InputError
from models.llada import LLaDAConfig, LLaDAModelLM, rotary

HEADS = {256: 4, 384: 6, 512: 8, 576: 9, 768: 12, 896: 14, 1024: 16, 1280: 10, 1408: 11, 1536: 12, 1792: 14, 2048: 16}
# by width, from SMDM's table of configurations, where a width has one number only
OUTER = {
    "transformer.wte.weight": "model.transformer.wte.weight",
    "transformer.ln_f.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
INNER = {
    "norm_1": "attn_norm",
    "norm_2": "ff_norm",
    "attn.proj": "attn_out",
    "mlp.swiglu.w1": "ff_proj",
    "mlp.swiglu.w2": "up_proj",
    "mlp.swiglu.w3": "ff_out",
}


class SMDMConfig(LLaDAConfig):
    model_type = "smdm"
    head_size: int | None = None  # rows of the head: the vocabulary without the mask

    @property
    def head_rows(self):
        return self.head_size or self.rows


class SMDMModelLM(LLaDAModelLM):
    config_class = SMDMConfig

    def rotary(self, length, device):
        return tuple(
            part.bfloat16().float()
            for part in rotary(length, self.config.d_model // self.config.n_heads, self.config.rope_theta, device)
        )


def config_of(shapes, heads=None):
    """The SMDMConfig of an original file's {tensor name: shape}. heads: needed for widths that SMDM has no model of."""
    try:
        (words, D), head = shapes["transformer.wte.weight"], shapes["lm_head.weight"][0]
        hidden = shapes["transformer.h.0.mlp.swiglu.w1.weight"][0]
    except KeyError as error:
        raise InputError(f"not an SMDM checkpoint: tensor {error.args[0]} is missing") from None
    layers = len({name.split(".")[2] for name in shapes if name.startswith("transformer.h.")})
    heads = heads or HEADS.get(D)
    if not heads or D % heads:
        raise InputError(
            f"an SMDM checkpoint of width {D}: how many heads it has cannot be read from it; give --n_heads"
        )
    return SMDMConfig(
        d_model=D,
        n_layers=layers,
        n_heads=heads,
        mlp_hidden_size=hidden,
        vocab_size=words,
        head_size=head,
        max_sequence_length=2048,
        rope_theta=10000.0,
        mask_token_id=words - 1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        architectures=["SMDMModelLM"],
    )


def from_original(tensors, heads):
    """Our names of an original file's {name: tensor}; raises InputError for a name that SMDM has not."""
    found = {}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", name)
        block = place and f"model.transformer.blocks.{place[1]}"
        if name in OUTER:
            found[OUTER[name]] = tensor
        elif place and place[2] in INNER:
            found[f"{block}.{INNER[place[2]]}.weight"] = tensor
        elif place and place[2] == "attn.attn":
            parts = tensor.view(heads, 3, -1, tensor.shape[1]).unbind(1)  # (heads, hd, D) each of q, k, v
            for part, ours in zip(parts, ("q_proj", "k_proj", "v_proj")):
                found[f"{block}.{ours}.weight"] = part.reshape(-1, tensor.shape[1]).contiguous()
        else:
            raise InputError(f"tensor {name} is not part of SMDM's architecture")
    return found


def to_original(tensors, heads):
    """The original's names of our {name: tensor}: from_original, undone."""
    outer, inner = ({ours: name for name, ours in names.items()} for names in (OUTER, INNER))
    found = {outer[name]: tensor for name, tensor in tensors.items() if name in outer}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(.+)\.weight", name)
        if place and place[2] in inner:
            found[f"transformer.h.{place[1]}.{inner[place[2]]}.weight"] = tensor
        elif place and place[2] == "q_proj":
            packed = [
                tensors[name.replace("q_proj", part)].view(heads, -1, tensor.shape[1])
                for part in ("q_proj", "k_proj", "v_proj")
            ]
            found[f"transformer.h.{place[1]}.attn.attn.weight"] = torch.stack(packed, 1).reshape(-1, tensor.shape[1])
    return found
