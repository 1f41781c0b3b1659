"""The families of masked diffusion models behind one interface: forward(input_ids, attention_mask, positions, targets).

    llada, smdm                         llada.py, smdm.py: that interface is theirs
    Dream, a2d-qwen2, -qwen3, -llama    transformers' Qwen2, Qwen3, Llama with the causal mask off
    qwen2, qwen3, llama                 the same, for a model that you converted: say --shift_logits
    bert, modernbert, albert, ...       transformers' masked language models, as they are
    anything else                       its own code, with --trust_remote_code

A shifted model's logits at i - 1 predict token i (Dream kept what Qwen2.5 had learnt so); the others' logits at i do.
B batch, L length, D width, V vocabulary, N scored positions.
"""

import re

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_outputs import MaskedLMOutput

from files import InputError
from models import (
    folders,
    llada,  # noqa: F401  registers model_type llada
)
from models.folders import base_folder, model_folder

# noqa: F401  and smdm
from models.head import Head


class DreamConfig(Qwen2Config):
    model_type = "Dream"


class A2DQwen2Config(Qwen2Config):
    model_type = "a2d-qwen2"


class A2DQwen3Config(Qwen3Config):
    model_type = "a2d-qwen3"


class A2DLlamaConfig(LlamaConfig):
    model_type = "a2d-llama"


for _config in (DreamConfig, A2DQwen2Config, A2DQwen3Config, A2DLlamaConfig):
    AutoConfig.register(_config.model_type, _config)

CAUSAL = {
    "Dream": "Qwen2ForCausalLM",
    "a2d-qwen2": "Qwen2ForCausalLM",
    "a2d-qwen3": "Qwen3ForCausalLM",
    "a2d-llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
KNOWN = {*CAUSAL, "llada", "smdm"}  # transformers' code or ours, whatever config.json's auto_map says
SHIFTED = {"Dream": True, "a2d-qwen2": False, "a2d-qwen3": False, "a2d-llama": False}
TOKENIZERS = {"DreamTokenizer": "Qwen2Tokenizer"}  # the same vocabulary, merges and rules: no remote code is needed
LEARNED = {
    "bert": 0,
    "albert": 0,
    "distilbert": 0,
    "electra": 0,
    "roberta": 2,
    "xlm-roberta": 2,
    "camembert": 2,
}  # rows unused
# Of the checkpoint's pre-training, and not of a mask predictor: left out by name, and gone from what is saved.
UNUSED = r"(bert|albert|roberta)\.pooler\..*|cls\.seq_relationship\..*|sop_classifier\..*|.*\.position_ids"
RENAMED = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))  # BERT's first names


def longest(config):
    """Tokens that a model with learned positions can read; None where positions are rotations."""
    if config.model_type not in LEARNED:
        return None
    return config.max_position_embeddings - LEARNED[config.model_type]


def shifted(config, wanted="auto"):
    """Whether logits at i - 1 predict token i: `wanted` (yes, no, or auto: config.json's shift_logits, else the family's)."""
    if config.model_type in ("llada", "smdm"):
        if wanted == "yes":
            raise InputError(f"--shift_logits yes: {config.model_type} predicts each token at its own place")
        return False
    if wanted != "auto":
        return wanted == "yes"
    said = getattr(config, "shift_logits", None)
    said = SHIFTED.get(config.model_type) if said is None else said
    if said is None and config.model_type in CAUSAL:
        raise InputError(
            f"config.json: model_type {config.model_type} is a causal model; if it was converted to diffusion, say "
            "whether its logits kept the shift: --shift_logits yes (as Dream) or no (as dllm's A2D)"
        )
    return bool(said)


def build(config, dtype, shift, trust_remote_code=False):
    """The model of `config` with the interface above, its weights not yet loaded."""
    if config.model_type in CAUSAL:
        config.is_causal = config.use_cache = False
        model = getattr(transformers, CAUSAL[config.model_type])._from_config(config, dtype=dtype)
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
    else:
        try:
            model = AutoModelForMaskedLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise InputError(
                f"config.json: model_type {config.model_type} is no masked language model that we know "
                f"({' '.join(str(error).split())[:120]}); its own code runs with --trust_remote_code"
            ) from None
    model.tie_weights()  # no_init_weights leaves that out
    return model if isinstance(model, llada.LLaDAModelLM) else adapt(model, shift)


def adapt(model, shift):
    """Give a transformers model the interface: its own forward runs, but the head reads scored positions alone.

    A pre-hook of the output embedding takes the N rows out of its input; what comes before them is the model's.
    """
    head, original = model.get_output_embeddings(), model.forward
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"config.json: model_type {model.config.model_type} has no linear output embedding, which the score needs"
        )
    head.__class__, wanted = Head, {}

    def rows(_, inputs):
        x = inputs[0]  # (B, L, D)
        if wanted["positions"] is not None:
            x = x.flatten(0, 1)[wanted["positions"]]  # (N, D)
        return x, wanted["targets"]

    head.register_forward_pre_hook(rows)

    def forward(input_ids, attention_mask=None, positions=None, targets=None):
        """As LLaDAModelLM.forward."""
        if shift and positions is not None:
            positions = (
                positions - (positions % input_ids.shape[1] > 0).long()
            )  # the first token has only its own place
        wanted.update(positions=positions, targets=targets)
        logits = original(input_ids=input_ids, attention_mask=attention_mask).logits
        if targets is not None:
            return logits  # log-probabilities (N,), which the head made
        if shift and positions is None:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
        return MaskedLMOutput(logits=logits)

    model.forward = forward
    return model


def checkpoint_name(name):
    """A checkpoint's tensor name as today's architecture has it; None for what belongs to no mask predictor."""
    for old, new in RENAMED:
        name = name.replace(old, new)
    return None if re.fullmatch(UNUSED, name) else name


def block_linears(model):
    """{name: (in, out)} of the nn.Linear modules inside the model's blocks: what LoRA may adapt. Never the head or what leads
    to it: LLaDA's ff_out is both a block's down-projection and the head's name."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    }


def load_config(name, trust_remote_code=False):
    """The configuration of a model, or of an adapter's base, with what was said of it when the adapter was trained."""
    folder = base_folder(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.json: {' '.join(str(error).split())[:300]}") from None
    noted = folders.adapter_base(model_folder(name))
    for field in ("mask_token_id", "shift_logits"):
        if field in noted and (field != "shift_logits" or config.model_type in CAUSAL):
            setattr(config, field, noted[field])
    return config
