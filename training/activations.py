"""Bytes of the tensors that autograd keeps of one graph, and of the largest moment of its backward pass.

    shapes.Shape, Graph -> activation_bytes(), layer_backward_bytes(), head_bytes()

They are those of the models' blocks (models/llada.py, transformers' Llama, Qwen2 and Qwen3, models/moe.py), of
models/attention.py and of models/head.py. bench/activations.py compares them with fake tensors of the full shapes.

N tokens of a graph, D width, H heads, G key/value heads, V vocabulary, k experts that a token is sent to.
"""

from typing import NamedTuple

from models.head import CHUNK_BYTES


class Graph(NamedTuple):
    """What one graph holds: its tokens, and of rows of block-causal models what their attention makes beside them."""

    tokens: int  # N
    scored: int  # tokens whose log-probabilities are read
    clean_keys: int = 0  # of the clean text of shared rows, C of each row
    copied_keys: int = 0  # of each copy's attention: the clean text and the copy, C + m
    seen: int = 0  # elements of the masks: C * C of each row, and m * (C + m)

    @property
    def is_shared(self):
        return self.copied_keys > 0

    @classmethod
    def of(cls, graphs):
        """Several graphs as one."""
        return cls(*map(sum, zip(*graphs)))

    def scaled(self, factor):
        """So many times this graph, in whole tokens."""
        return Graph(*(round(factor * number) for number in self))


class Kind(NamedTuple):
    """How a graph is computed."""

    weight: int  # bytes of a weight and of an activation: 2 in bfloat16, 4 in float32
    checkpointing: bool  # each layer keeps its input alone
    repeats_heads: bool  # on CUDA, keys and values of G heads are repeated to H


def activation_bytes(shape, graph, kind):
    """Bytes that a graph holds when its backward pass starts."""
    if kind.checkpointing:
        return graph.tokens * len(shape.layers) * kind.weight * shape.width
    return sum(layer_bytes(shape, layer, graph, kind) for layer in shape.layers)


def layer_bytes(shape, layer, graph, kind):
    """Bytes of the tensors that autograd saves in a layer."""
    hidden = kind.weight * shape.width  # one tensor (N, D)
    normalised = 0 if shape.frozen else hidden  # a norm's weight needs it for its gradient
    norms = 2 * (4 * shape.width + normalised + hidden)  # their inputs in float32 (copies in bfloat16), and outputs
    if shape.frozen and not layer.mlp_width:
        norms -= hidden  # frozen experts need no inputs for their gradients
    of_mlp = dense_bytes(layer, kind) + expert_bytes(shape, layer, kind)
    return graph.tokens * (norms + of_mlp) + attention_bytes(shape, graph, kind)


def attention_bytes(shape, graph, kind):
    """Queries, keys, values and outputs of a layer, and what its norms of queries and keys save."""
    Q, K = shape.query_width, shape.key_width
    elements = graph.tokens * 2 * Q  # queries, outputs
    if graph.is_shared:
        elements += graph.tokens * (Q + 2 * K) + graph.seen  # outputs in the order of the row, keys, values; masks
    elements += 2 * keys_of(shape, graph, kind)
    if shape.packs_heads:
        elements += graph.tokens * (Q + K)  # beside the values, which are a part of one tensor
    in_norms = 0
    if shape.has_qk_norm:
        in_norms = (Q + K) * (4 + (0 if shape.frozen else kind.weight))  # in float32; normalised
    return kind.weight * elements + graph.tokens * in_norms


def keys_of(shape, graph, kind):
    """Elements of the keys of a layer that attention itself reads: those that shared rows copy, or all of them."""
    heads = shape.query_width if kind.repeats_heads else shape.key_width
    if not graph.is_shared:
        return graph.tokens * heads
    is_clean_repeated = heads > shape.key_width
    return heads * (graph.copied_keys + (graph.clean_keys if is_clean_repeated else 0))


def dense_bytes(layer, kind):
    """Bytes for each token of a dense MLP, or of shared experts: gate, its activation, up, their product."""
    return kind.weight * 4 * layer.mlp_width


def expert_bytes(shape, layer, kind):
    """Bytes for each token of models/experts.py: the same for each of k experts, the router's probabilities, places."""
    if not layer.chosen:
        return 0
    found = layer.chosen * (kind.weight * 4 * layer.expert_width + 64) + 4 * shape.experts
    if not shape.frozen:  # inputs of the stacks, and of the router in float32
        found += layer.chosen * kind.weight * (shape.width + layer.expert_width) + 4 * shape.width
    return found


def layer_backward_bytes(shape, graph, kind):
    """Bytes that a layer's backward pass holds at most beside activation_bytes(): gradients, what is computed again."""
    return max(one_backward_bytes(shape, layer, graph, kind) for layer in shape.layers)


def one_backward_bytes(shape, layer, graph, kind):
    """As layer_backward_bytes(), of one layer: the moments come one after the other."""
    hidden, of_mlp = kind.weight * shape.width, dense_bytes(layer, kind) + expert_bytes(shape, layer, kind)
    recomputed = layer_bytes(shape, layer, graph, kind) if kind.checkpointing else 0
    if kind.checkpointing and kind.weight == 4:
        recomputed -= graph.tokens * 4 * shape.width  # the first norm's input is the layer's
    moments = [
        graph.tokens * (hidden + 2 * kind.weight * layer.mlp_width),  # in the MLP
        2 * kind.weight * keys_of(shape, graph, kind) - graph.tokens * of_mlp,  # in attention, which comes last
    ]
    if layer.chosen:
        moments += [in_experts_forward(shape, layer, graph, kind), in_experts_backward(shape, layer, graph, kind)]
    return recomputed + max(moments)


def in_experts_forward(shape, layer, graph, kind):
    """Bytes of the sorted rows while experts run, beside layer_bytes(): without checkpointing, or computed again.

    Under checkpointing the second forward stops at the last tensor that is saved, before frozen experts' outputs.
    """
    is_cut_short = kind.checkpointing and not layer.mlp_width
    wide = 1 if is_cut_short else 3  # (N k, D): inputs, outputs, outputs in the order of the tokens
    narrow = 1  # (N k, F): inputs of the last product
    if not shape.frozen:  # inputs are saved, and counted there
        wide, narrow = wide - 1, 0
    rows = layer.chosen * (wide * shape.width + narrow * layer.expert_width)
    return graph.tokens * (kind.weight * (rows + 4 * shape.width) - dense_bytes(layer, kind))


def in_experts_backward(shape, layer, graph, kind):
    """Bytes of gradients in the experts' backward pass, beside layer_bytes()."""
    rows = layer.chosen * kind.weight * (shape.width + layer.expert_width)  # of the last product's outputs and inputs
    weighing = layer.chosen * 12 * layer.expert_width  # of the product with the router's weights, in float32
    stack = 0
    if not shape.frozen:
        stack = kind.weight * layer.stack
        weighing -= layer.chosen * kind.weight * layer.expert_width
    return max(graph.tokens * rows + stack, graph.tokens * weighing) + 2 * graph.tokens * kind.weight * shape.width


def head_bytes(shape, graph, kind):
    """Bytes of the backward pass of the head (models/head.py), beside activation_bytes()."""
    one_token = 4 * shape.vocabulary
    chunk = min(max(CHUNK_BYTES, one_token), graph.scored * one_token)
    logits = chunk * (1.5 if kind.weight == 2 else 1)  # in float32, and in bfloat16
    hidden = kind.weight * shape.width  # one tensor (N, D): the scored positions, and their gradient
    last_norm = 4 * shape.width + (0 if shape.frozen else hidden)
    gradient = 0 if shape.frozen else kind.weight * shape.head
    return logits + graph.scored * 2 * hidden + graph.tokens * last_norm + gradient
