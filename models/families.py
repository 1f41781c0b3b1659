"""The families of masked diffusion models: what is known of each from config.json alone. Imports no torch.

    llada, smdm                  LLaDA's architecture: llada.py; SMDM's files and tensor names: smdm.py
    lladamoe, llada2_moe         LLaDA-MoE, bidirectional, and LLaDA2, block-causal: moe.py
    Dream, illada                transformers' Qwen2 and Llama with the causal mask off
    sdar, Fast_dLLM_Qwen         transformers' Qwen3 and Qwen2, block-causal (SDAR, TraDo, DiRL; Fast-dLLM v2)
    nemotron_labs_diffusion      transformers' Ministral3, block-causal: nemotron.py
    a2d-qwen2, -qwen3, -llama    transformers' Qwen2, Qwen3, Llama, of either kind: give --block_size
    qwen2, qwen3, llama          the same, for a model that you converted: give --shift_logits, too
    bert, modernbert, ...        transformers' masked language models, unchanged
    anything else                the model's own code, with --trust_remote_code

A shifted model's logits at position i - 1 predict token i, as in the causal model that it was made of (Dream, from
Qwen2.5). The logits of all others at position i predict token i. architecture.py builds the models.

A bidirectional model's token sees the whole row. A block-causal model's sees its own block and those before it.

To add a family: name it in the tables below. If transformers has no class for it, write one as llada.py does.
"""

import re
from typing import NamedTuple

from files import InputError

OURS = {"llada", "smdm", "lladamoe", "llada2_moe"}  # built by llada.py, smdm.py and moe.py
CAUSAL = {  # model_type in config.json: the class of transformers that builds it, with the causal mask off
    "Dream": "Qwen2ForCausalLM",
    "illada": "LlamaForCausalLM",
    "sdar": "Qwen3ForCausalLM",
    "Fast_dLLM_Qwen": "Qwen2ForCausalLM",
    "nemotron_labs_diffusion": "NemotronModelLM",  # of nemotron.py
    "a2d-qwen2": "Qwen2ForCausalLM",
    "a2d-qwen3": "Qwen3ForCausalLM",
    "a2d-llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
KNOWN = OURS | CAUSAL.keys()  # transformers' code or ours builds these, whatever config.json's auto_map names
ARCHITECTURES = {  # named in config.json: the family, whatever its model_type is
    "ILLaDAForCausalLM": "illada",
    "LLaDAMoEModelLM": "lladamoe",  # published as model_type llada
    "LLaDAMoEModel": "lladamoe",
}
SHIFTED = {
    "Dream": True,
    "illada": False,
    "sdar": False,
    "Fast_dLLM_Qwen": True,
    "nemotron_labs_diffusion": False,
    "a2d-qwen2": False,
    "a2d-qwen3": False,
    "a2d-llama": False,
}
BIDIRECTIONAL = {"llada", "smdm", "lladamoe", "Dream", "illada"}
BLOCK_FIELD = {  # block-causal families: the field of config.json with the tokens of a block
    "sdar": "block_size",
    "Fast_dLLM_Qwen": "bd_size",
    "nemotron_labs_diffusion": "block_size",
    "llada2_moe": "block_size",
}
BLOCK_SIZE = {"llada2_moe": 32}  # where config.json does not say it
EITHER = CAUSAL.keys() - BIDIRECTIONAL - BLOCK_FIELD.keys()  # --block_size says it, or config.json as we saved it
WITH_BLOCKS = BLOCK_FIELD.keys() | EITHER
SAMPLED_FROM_PROMPT = {"nemotron_labs_diffusion", "a2d-qwen2", "a2d-qwen3", "a2d-llama"}  # Blocks.sampled_from
ROTATION = {  # what config.json must say of rotary positions: transformers' defaults are other models'
    "illada": ("rope_theta",),
    "sdar": ("rope_theta",),
    "Fast_dLLM_Qwen": ("rope_theta",),
    "nemotron_labs_diffusion": ("rope_theta", "original_max_position_embeddings", "llama_4_scaling_beta"),
}
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
    """How a block-causal model reads a row (docs/method.md). Blocks are counted from the row's first token.

    size: tokens of a block. is_causal: a clean token sees the clean tokens up to itself, not to the end of its block.
    shift: the logits at i - 1 predict token i. first_from_clean: the clean token before a block predicts the block's
    first token, which is never masked. sampled_from: where the sampler's blocks begin, at the first token of the "row"
    or after the "prompt".
    """

    size: int
    is_causal: bool = False
    shift: bool = False
    first_from_clean: bool = False
    sampled_from: str = "row"


class Masking(NamedTuple):
    """What a model's masked rows look like: the mask's token id, and its blocks if it is block-causal."""

    mask_id: int
    blocks: Blocks | None = None


def model_type(fields):
    """The family of a config.json's fields: by its architecture where that says more than its model_type."""
    named = fields.get("architectures")
    found = [ARCHITECTURES[name] for name in named if name in ARCHITECTURES] if isinstance(named, list) else []
    return found[0] if found else fields.get("model_type")


def refuse_unsupported(fields):
    """Refuse a config.json that leaves out what this family's makers set in it, or asks for what is not built here."""
    kind = model_type(fields)
    rotation = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    needed = ROTATION.get(kind, ())
    missing = [name for name in needed if name not in rotation and (name != "rope_theta" or name not in fields)]
    if missing:
        raise InputError(f"config.json: names no {missing[0]}, and model_type {kind} has no default for it")
    if kind == "illada" and fields.get("layer_norm_eps") is not None:
        raise InputError("config.json: layer_norm_eps is given, and of iLLaDA only RMSNorm (rms_norm_eps) is supported")


def block_field(kind):
    """The field of config.json that holds the block size of a model_type."""
    return BLOCK_FIELD.get(kind, "block_size")


def block_size(config, wanted="auto"):
    """Tokens of a block of a block-causal model; 0 for a bidirectional one.

    config: from architecture.load_config() or folders.plain_config(). wanted: a number, or auto: what config.json says.
    Raises InputError where neither says it, or they contradict each other.
    """
    kind, field = config.model_type, block_field(config.model_type)
    known = getattr(config, field, None) if kind in KNOWN else None
    least = 1 if kind in BLOCK_FIELD else 0
    if wanted != "auto" and wanted < 0:
        raise InputError(f"--block_size is {wanted}, expected 0 (bidirectional attention) or more")
    if known is not None and (type(known) is not int or known < least):
        raise InputError(f"config.json: {field} is {known!r}, expected a whole number of at least {least}")
    if kind not in WITH_BLOCKS:
        said = f"config.json: {field} is {known}" if known else f"--block_size {wanted}"
        if known or wanted not in ("auto", 0):
            raise InputError(f"{said}: model_type {kind} has no blocks, its attention is bidirectional; leave it out")
        return 0
    if wanted == 0 and kind in BLOCK_FIELD:
        raise InputError(f"--block_size 0: model_type {kind} is block-causal, expected at least 1")
    if known is not None and wanted not in ("auto", known):
        raise InputError(f"--block_size {wanted}: config.json says {field} {known}; leave the flag out")
    if wanted != "auto":
        return wanted
    size = BLOCK_SIZE.get(kind) if known is None else known
    if size is None:
        either = "0 (bidirectional, as dllm's mdlm models) or the tokens of a block (block-causal, as bd3lm)"
        raise InputError(
            f"config.json: model_type {kind} does not say how attention runs; give --block_size "
            f"{either if kind in EITHER else 'N, the tokens of a block'}"
        )
    return size


def blocks(config, wanted="auto", shift_logits="auto"):
    """The Blocks of a block-causal model; None for a bidirectional one.

    Arguments and errors as block_size() and shifted(). A shifted model's logits at a block's first token predict the
    second, so the first is predicted by the clean token before it, as Fast-dLLM v2's sampler does.
    """
    size = block_size(config, wanted)
    if not size:
        return None
    shift, is_causal = shifted(config, shift_logits), config.model_type == "nemotron_labs_diffusion"
    sampled_from = "prompt" if config.model_type in SAMPLED_FROM_PROMPT else "row"
    return Blocks(size, is_causal, shift, shift or is_causal, sampled_from)


def settle(config, shift_logits="auto", wanted="auto"):
    """Write shift and block size into `config`, which is saved with the model, so that the next script finds them.

    Returns whether logits are shifted. Arguments and errors as block_size() and shifted().
    """
    shift, size = shifted(config, shift_logits), block_size(config, wanted)
    if config.model_type in CAUSAL:
        config.shift_logits = shift
    if config.model_type in WITH_BLOCKS:
        setattr(config, block_field(config.model_type), size)
    return shift


def attention_line(config, wanted="auto"):
    """One line for the terminal: how the model's attention runs, and what says so. config: folders.plain_config()'s."""
    kind, size = config.model_type, block_size(config, wanted)
    if kind not in KNOWN:
        return f"attention: as its own class runs it (model_type {kind})"
    said = f"model_type {kind}"
    if kind in WITH_BLOCKS and getattr(config, block_field(kind), None) is not None:
        said = "config.json"
    elif kind in WITH_BLOCKS and wanted != "auto":
        said = "--block_size"
    clean = ", clean tokens causal" if kind == "nemotron_labs_diffusion" else ""
    how = f"block-causal, blocks of {size} tokens{clean}" if size else "bidirectional"
    return f"attention: {how} ({said})"


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
    kind = config.model_type
    if kind in OURS | BLOCK_FIELD.keys() | {"illada"}:
        shift = SHIFTED.get(kind, False)
        if wanted != "auto" and (wanted == "yes") != shift:
            place = "the place before" if shift else "its own place"
            raise InputError(f"--shift_logits {wanted}: {kind} predicts each token at {place}")
        return shift
    if wanted != "auto":
        return wanted == "yes"
    known = getattr(config, "shift_logits", None)
    if known is None:
        known = SHIFTED.get(kind)
    if known is None and kind in CAUSAL:
        raise InputError(
            f"config.json: model_type {kind} is a causal model; if it was converted to diffusion, say "
            "whether its logits kept the shift: --shift_logits yes (as Dream) or no (as dllm's A2D)"
        )
    return bool(known)


def checkpoint_name(name):
    """Today's name of a checkpoint's tensor; None for a tensor that no mask predictor uses."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return None if re.fullmatch(UNUSED, name) else name
