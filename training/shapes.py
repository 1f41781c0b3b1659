"""Count a model's tensors from its config.json: on the meta device, exact, without memory.

    config.json + arguments -> model_shape() -> Shape, which footprint.py and costs.py read

D width, V vocabulary, E experts, k experts that a token is sent to.
"""

import re
from typing import NamedTuple

import torch
from transformers.initialization import no_init_weights

from files import InputError
from models import architecture, families, lora

ATTENTION = r"attn|attention|\b[qkv]_proj"  # in the name of a linear layer of attention: the others are an MLP's
QK_NORM = r"\b(q_norm|k_norm|query_layernorm|key_layernorm)\b"  # in the name of a norm of each query and key
PACKED = r"\bquery_key_value\b"  # in the name of a linear layer that makes queries, keys and values


class Layer(NamedTuple):
    """One of a model's layers."""

    parameters: int
    matrices: int  # elements that a token is multiplied with; of experts, those of the k that it is sent to
    mlp_width: int  # features of the MLP that all tokens pass: a dense one, or shared experts; 0: none
    expert_width: int = 0  # features of an expert; 0: no experts
    chosen: int = 0  # k
    idle: int = 0  # elements of the experts that a token is not sent to
    stack: int = 0  # elements of the largest stack of experts


class Shape(NamedTuple):
    """Elements of a model's tensors."""

    trained: list  # elements of each tensor with a gradient, in order
    frozen: list  # elements of each other tensor
    packed: int  # of the frozen elements, those in 4 bits
    unpacked: int  # elements of 16 bits that are made of them at once: a linear layer's twice, or a stack of experts
    layers: list  # the Layer of each
    experts: int  # E, 0 in a dense model
    head: int  # V * D
    embedding: int  # V * D; 0 if it is the head's
    vocabulary: int
    width: int
    query_width: int  # heads * head width
    key_width: int  # key-value heads * head width
    has_qk_norm: bool  # queries and keys are normalised
    packs_heads: bool  # one linear layer makes queries, keys and values, and the values are a part of its output
    blocks: families.Blocks | None  # of a block-causal model

    @property
    def tensors(self):
        """Elements of each tensor of the model and of its adapters."""
        return self.frozen + self.trained

    @property
    def parameters(self):
        """Elements of the model alone, without adapters."""
        return sum(self.frozen or self.trained)

    @property
    def elements(self):
        """Elements of the model and of its adapters."""
        return sum(self.tensors)

    @property
    def block_weights(self):
        """Elements that a token is multiplied with in all layers: 2 operations each."""
        return sum(layer.matrices for layer in self.layers)

    @property
    def active(self):
        """Parameters that a token passes: all but those of the experts that it is not sent to."""
        return self.parameters - sum(layer.idle for layer in self.layers)

    @property
    def largest_block(self):
        return max(layer.parameters for layer in self.layers)


def model_shape(model_config, model_args):
    """The Shape of a model. Raises InputError for one without blocks."""
    shifted = families.settle(model_config, model_args.shift_logits, model_args.block_size)
    with torch.device("meta"), no_init_weights():
        model = architecture.build(model_config, torch.bfloat16, shifted, model_args.trust_remote_code)
    linears = architecture.block_linears(model)
    if not linears:
        raise InputError(
            f"config.json: model_type {model_config.model_type} has no blocks with linear layers to plan for"
        )
    inside = by_block(model.named_parameters())
    names = " ".join(inside[0])
    count, heads = model_config.num_hidden_layers, model_config.num_attention_heads
    layers = [layer(block, model_config) for block in inside.values()]
    layers *= count // len(layers)  # ALBERT runs one block many times
    key_heads = getattr(model_config, "num_key_value_heads", None) or heads
    head_width = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    weights = [parameter.numel() for parameter in model.parameters()]  # tied ones once
    adapters = []
    if model_args.lora_r:
        for name in lora.pattern(model, model_args.lora_targets)[1]:
            adapters += [model_args.lora_r * features for features in linears[name]]
    in_linears = sum(inputs * outputs for inputs, outputs in linears.values())
    largest_linear = max(inputs * outputs for inputs, outputs in linears.values())
    in_experts = sum(shape.numel() for block in inside.values() for shape in block.values() if len(shape) == 3)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return Shape(
        trained=adapters or weights,
        frozen=weights if adapters else [],
        packed=in_linears + in_experts if model_args.load_in_4bit else 0,
        unpacked=max(2 * largest_linear, *(layer.stack for layer in layers)) if model_args.load_in_4bit else 0,
        layers=layers,
        experts=model_config.num_experts if in_experts else 0,
        head=head.weight.numel(),
        embedding=0 if embedding.weight is head.weight else embedding.weight.numel(),
        vocabulary=head.out_features,
        width=model_config.hidden_size,
        query_width=heads * head_width,
        key_width=key_heads * head_width,
        has_qk_norm=bool(re.search(QK_NORM, names)),
        packs_heads=bool(re.search(PACKED, names)),
        blocks=model.blocks,
    )


def by_block(parameters):
    """{block's number: {name inside the block: shape}} of the named `parameters` that belong to a block."""
    found = {}
    for name, parameter in parameters:
        place = re.match(r".*?\.(\d+)\.(.+)", name)
        if place:
            found.setdefault(int(place[1]), {})[place[2]] = parameter.shape
    return found


def layer(block, model_config):
    """The Layer of a block's {name: shape}. Stacks of experts have three dimensions, (E, out, in)."""
    stacks = [shape for shape in block.values() if len(shape) == 3]
    matrices = {name: shape for name, shape in block.items() if len(shape) == 2}
    chosen = model_config.num_experts_per_tok if stacks else 0
    in_mlp = [shape for name, shape in matrices.items() if not re.search(ATTENTION, name)]  # the last is (D, F)
    D = model_config.hidden_size
    return Layer(
        parameters=sum(shape.numel() for shape in block.values()),
        matrices=sum(shape.numel() for shape in matrices.values()) + chosen * sum(map(one_expert, stacks)),
        mlp_width=max((columns for rows, columns in in_mlp if rows == D), default=0),
        expert_width=max((columns for _, rows, columns in stacks if rows == D), default=0),
        chosen=chosen,
        idle=sum((stack[0] - chosen) * one_expert(stack) for stack in stacks),
        stack=max((shape.numel() for shape in stacks), default=0),
    )


def one_expert(stack):
    """Elements of an expert's matrix in a stack (E, out, in)."""
    return stack[1] * stack[2]
