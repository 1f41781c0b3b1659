"""The families of masked diffusion models: what is known of each from config.json alone. Imports no torch.

    llada, smdm                         LLaDA's architecture: llada.py; SMDM's files and tensor names: smdm.py
    lladamoe, llada2_moe                mixtures of experts: moe.py; LLaDA-MoE's config.json says llada (model_type())
    Dream, a2d-qwen2, -qwen3, -llama    transformers' Qwen2, Qwen3, Llama with the causal mask off
    qwen2, qwen3, llama                 the same, for a model that you converted: give --shift_logits
    bert, modernbert, albert, ...       transformers' masked language models, unchanged
    anything else                       the model's own code, with --trust_remote_code

A shifted model's logits at position i - 1 predict token i, as in the causal model that it was made of (Dream, from
Qwen2.5). The logits of all others at position i predict token i. architecture.py builds the models.

To add a family: name it in the tables below. If transformers has no class for it, write one as llada.py does.
"""

import re
from typing import NamedTuple

from files import InputError

OURS = {"llada", "smdm", "lladamoe", "llada2_moe"}  # built by llada.py, smdm.py and moe.py
CAUSAL = {  # model_type in config.json: the class of transformers that builds it, with the causal mask off
    "Dream": "Qwen2ForCausalLM",
    "a2d-qwen2": "Qwen2ForCausalLM",
    "a2d-qwen3": "Qwen3ForCausalLM",
    "a2d-llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
KNOWN = OURS | CAUSAL.keys()  # transformers' code or ours builds these, whatever config.json's auto_map names
SHIFTED = {"Dream": True, "a2d-qwen2": False, "a2d-qwen3": False, "a2d-llama": False}
TOKENIZERS = {"DreamTokenizer": "Qwen2Tokenizer"}  # the same vocabulary, merges and rules: no remote code is needed
MASK_TOKENS = {  # the mask token's name, for a model whose config.json and tokenizer declare none
    "illada": "<[MASK]>",
    "lladamoe": "<|mask|>",
    "llada2_moe": "<|mask|>",
    "sdar": "<|MASK|>",
    "Fast_dLLM_Qwen": "|<MASK>|",
}
LEARNED_POSITIONS = {  # families with a table of positions, and how many of its first rows are unused
    "bert": 0,
    "albert": 0,
    "distilbert": 0,
    "electra": 0,
    "roberta": 2,
    "xlm-roberta": 2,
    "camembert": 2,
}
# Tensors of pre-training that a mask predictor does not use: they are not loaded, and not saved.
UNUSED = r"(bert|albert|roberta)\.pooler\..*|cls\.seq_relationship\..*|sop_classifier\..*|.*\.position_ids"
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # BERT's first names


class Blocks(NamedTuple):
    """How a block-causal model reads a row (docs/method.md). Blocks are counted from the row's first token."""

    size: int  # tokens of a block
    is_causal: bool = False  # a clean token sees the clean tokens up to itself, not up to the end of its block
    shift: bool = False  # the logits at i - 1 predict token i
    first_from_clean: bool = (
        False  # the clean token before a block predicts the block's first token, which is never masked
    )
    sampled_from: str = (
        "row"  # where the sampler's blocks begin: at the first token of the "row", or after the "prompt"
    )


class Masking(NamedTuple):
    """What a model's masked rows look like: the mask's token id, and its blocks if it is block-causal."""

    mask_id: int
    blocks: Blocks | None = None


def blocks(config, wanted="auto"):
    """The Blocks of a block-causal model; None for a bidirectional one."""
    return None


def model_type(fields):
    """The model_type of config.json's `fields`: LLaDA-MoE's says llada, and names the class."""
    is_moe = {"LLaDAMoEModelLM", "LLaDAMoEModel"} & set(fields.get("architectures") or ())
    return "lladamoe" if is_moe else fields.get("model_type")


def longest(config):
    """Tokens that a model with learned positions can read; None where positions are rotations."""
    if config.model_type not in LEARNED_POSITIONS:
        return None
    return config.max_position_embeddings - LEARNED_POSITIONS[config.model_type]


def shifted(config, wanted="auto"):
    """Whether logits at i - 1 predict token i.

    config: from architecture.load_config() or folders.plain_config(). wanted: yes, no, or auto: config.json's
    shift_logits, else the family's. Raises InputError where neither is known.
    """
    if config.model_type in OURS:
        if wanted == "yes":
            raise InputError(f"--shift_logits yes: {config.model_type} predicts each token at its own place")
        return False
    if wanted != "auto":
        return wanted == "yes"
    known = getattr(config, "shift_logits", None)
    if known is None:
        known = SHIFTED.get(config.model_type)
    if known is None and config.model_type in CAUSAL:
        raise InputError(
            f"config.json: model_type {config.model_type} is a causal model; if it was converted to diffusion, say "
            "whether its logits kept the shift: --shift_logits yes (as Dream) or no (as dllm's A2D)"
        )
    return bool(known)


def checkpoint_name(name):
    """Today's name of a checkpoint's tensor; None for a tensor that no mask predictor uses."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return None if re.fullmatch(UNUSED, name) else name
