"""Build a model of any family behind one interface: forward(input_ids, attention_mask, positions, targets, rows).

    load_config(name) -> build(config, dtype, shift) -> a model without its weights, which checkpoint.py fills

families.py lists the families. LLaDA's own model is in llada.py; adapt() gives the others its interface. A model whose
joins_rows is false takes no `rows`: all rows of its forward pass must have one length.

B batch, L length, D width, V vocabulary, N scored positions.
"""

import re

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_outputs import MaskedLMOutput

from files import InputError
from models import attention, families, folders, moe, nemotron  # noqa: F401 (moe and nemotron register model types)
from models.families import CAUSAL
from models.head import Head
from models.llada import LLaDAModelLM  # it registers model_type llada itself
from models.smdm import SMDMConfig, SMDMModelLM


class DreamConfig(Qwen2Config):
    model_type = "Dream"


class A2DQwen2Config(Qwen2Config):
    model_type = "a2d-qwen2"


class A2DQwen3Config(Qwen3Config):
    model_type = "a2d-qwen3"


class A2DLlamaConfig(LlamaConfig):
    model_type = "a2d-llama"


class ILLaDAConfig(LlamaConfig):
    model_type = "illada"


class SDARConfig(Qwen3Config):
    model_type = "sdar"


class FastDLLMConfig(Qwen2Config):
    model_type = "Fast_dLLM_Qwen"


for _config in (DreamConfig, A2DQwen2Config, A2DQwen3Config, A2DLlamaConfig, ILLaDAConfig, SDARConfig, FastDLLMConfig):
    AutoConfig.register(_config.model_type, _config)
AutoConfig.register("smdm", SMDMConfig)
AutoModel.register(SMDMConfig, SMDMModelLM)
AutoModelForMaskedLM.register(SMDMConfig, SMDMModelLM)


def load_config(name, trust_remote_code=False):
    """The configuration of a model, or of an adapter's base with what the adapter's training noted of it."""
    folder = folders.base_folder(name)
    fields = folders.config_fields(folder)
    kind = families.model_type(fields)
    families.refuse_unsupported(fields)
    try:
        if kind == fields.get("model_type"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        else:
            config = AutoConfig.for_model(**fields | {"model_type": kind})
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.json: {' '.join(str(error).split())[:300]}") from None
    for field, value in folders.noted_fields(name, config.model_type).items():
        setattr(config, field, value)
    return config


def build(config, dtype, shift, trust_remote_code=False):
    """The model of `config`, its weights not yet loaded. shift: whether its logits at i - 1 predict token i."""
    if config.model_type in CAUSAL:
        config.is_causal = config.use_cache = False
        name = CAUSAL[config.model_type]
        kind = getattr(nemotron, name, None) or getattr(transformers, name)
        model = kind._from_config(config, dtype=dtype, attn_implementation=attention.NAME)
        model.joins_rows = rows_are_apart(config)
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
    model.blocks = families.blocks(config)
    if model.blocks and not model.joins_rows:
        raise InputError(
            f"config.json: model_type {config.model_type} is block-causal, which is not supported with sliding windows "
            "or with rotations by the row's length"
        )
    return model if isinstance(model, LLaDAModelLM) else adapt(model, shift)


def bare(model):
    """A model without the engine that DeepSpeed may have put around it."""
    return getattr(model, "module", model)


def rows_are_apart(config):
    """Whether a row's scores are its own where rows of several lengths share a pass.

    They are not with sliding windows, which attention end to end does not know, nor with rotations that depend on the
    longest row of the pass (transformers' modeling_rope_utils.py, dynamic_rope_update).
    """
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if config.model_type == "nemotron_labs_diffusion":
        slides = config.sliding_window is not None
    return not slides and rotation not in ("dynamic", "longrope")


def adapt(model, shift):
    """Give a model of transformers LLaDAModelLM's interface: its own forward runs, but its head reads only scored rows.

    A pre-hook of the output embedding selects the N rows from the head's input.
    """
    head, original_forward = model.get_output_embeddings(), model.forward
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"config.json: model_type {model.config.model_type} has no linear output embedding, which the score needs"
        )
    head.__class__ = Head
    wanted = {}  # positions and targets of the forward pass that runs now

    def select_rows(_, inputs):
        x = inputs[0]  # (B, L, D)
        if wanted["positions"] is not None:
            x = x.flatten(0, 1)[wanted["positions"]]  # (N, D)
        return x, wanted["targets"]

    def forward(input_ids, attention_mask=None, positions=None, targets=None, rows=None):
        """As LLaDAModelLM.forward.

        The logits of a block-causal model's `rows` are those of the causal model that it was made of: the caller knows
        which of them predicts a token.
        """
        joined, places = {}, torch.arange(input_ids.numel(), device=input_ids.device) % input_ids.shape[1]
        if rows:
            places = rows.places
            joined = {"position_ids": places[None], "rows": rows}
        is_shifted = shift and not (rows and model.blocks)
        if is_shifted and positions is not None:
            is_first = places[positions] == 0  # (N,) nothing precedes it: its own logits predict it
            positions = torch.where(is_first, positions, positions - 1)
        wanted.update(positions=positions, targets=targets)
        logits = original_forward(input_ids=input_ids, attention_mask=attention_mask, **joined).logits
        if targets is not None:
            return logits  # (N,) log-probabilities, which the head made
        if is_shifted and positions is None:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)  # (B, L, V)
        return MaskedLMOutput(logits=logits)

    head.register_forward_pre_hook(select_rows)
    model.forward, model.is_shifted = forward, shift
    model.joins_rows = getattr(model, "joins_rows", False)
    return model


def block_modules(model):
    """The model's blocks, in order: the elements of its outermost nn.ModuleLists."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [block for name in outermost for block in model.get_submodule(name)]


def recompute_activations(model):
    """Keep each block's input alone in the graph, and compute the rest again in the backward pass."""
    if model.supports_gradient_checkpointing:  # ALBERT does not
        # Non-reentrant: the only kind that works under ZeRO-3 with several forwards a step
        model.activation_checkpointing_enable({"use_reentrant": False})


def block_linears(model):
    """{name: (in, out)} of the nn.Linear modules inside the model's blocks, which LoRA may adapt.

    Neither the head nor what leads to it: a block's number in the name tells them apart, because LLaDA calls both
    the head and a block's down-projection ff_out.
    """
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    }
