"""Memory of sampling: how many rows, prompt and response, fit beside the weights. No weights are read.

    shapes.Shape + SampleArguments -> row_bytes(), batch_rows()     for --batch_size auto, and for plan.py --for

A pass without a graph holds the activations of one layer at a time. bench/activations.py's fake tensors give the same
peaks (tests/training/test_sampling_memory.py).

D width, F width of the MLP, k experts that a token is sent to, Q and K widths of all queries and of all keys, V
vocabulary.
"""

from typing import NamedTuple

import config
from models.head import CHUNK_BYTES
from scoring.passes import ENOUGH
from training.footprint import Machine, bytes_per_element, parameter_items, placement
from training.memory import ROOM
from training.shapes import model_shape

SMALL = 1024  # bytes for each token of ids, places and what else has no width
DRAWING = 4  # arrays of a chunk of logits: in float32, divided by the temperature, their softmax, and a copy
GUIDED = 5  # arrays of logits with guidance: those with the prompt and without it, and three of their combination


class RowBytes(NamedTuple):
    """What a row holds on the card."""

    cache: float  # keys and values of all layers
    activations: float  # while a pass reads the whole row
    logits: float  # of a block's places, as the model makes them

    @property
    def total(self):
        return sum(self)


def model_arguments(sample):
    """The ModelArguments by which a plan of training describes the same model."""
    names = ("model_name_or_path", "trust_remote_code", "shift_logits", "block_size", "use_mixed_precision")
    given = {name: getattr(sample, name) for name in (*names, "load_in_4bit", "deepspeed")}
    return config.ModelArguments(**given)


def sampled_shape(model_config, sample):
    """The Shape of a model that `sample` samples: nothing of it is trained."""
    shape = model_shape(model_config, model_arguments(sample))
    return shape._replace(frozen=shape.trained, trained=[])


def has_cache(shape, sample):
    """Whether keys and values are kept: always of a block-causal model, of others if asked."""
    return shape.blocks is not None or sample.cache != "none"


def tokens_read(shape, sample, row):
    """Tokens of a row of `row` tokens that most passes read, at most."""
    if not has_cache(shape, sample):
        return row
    return sample.gen_length if sample.cache == "prefix" and shape.blocks is None else sample.block_length


def row_bytes(shape, sample, row):
    """RowBytes of a row of `row` tokens. sample: SampleArguments after arguments.check()."""
    weight = bytes_of_weight(sample)
    passes = 2 if sample.cfg_scale else 1  # guidance reads each row twice
    kept = 2 * len(shape.layers) * shape.key_width * weight if has_cache(shape, sample) else 0
    return RowBytes(
        cache=passes * row * kept,
        activations=passes * row * token_bytes(shape, weight),
        logits=(GUIDED if sample.cfg_scale else 1) * sample.block_length * shape.vocabulary * weight,
    )


def drawing_bytes(shape, sample, rows):
    """Bytes in which the tokens of `rows` rows are drawn, chunk by chunk (reasoning/commits.py)."""
    return DRAWING * min(CHUNK_BYTES, rows * sample.block_length * shape.vocabulary * 4)


def bytes_of_weight(sample):
    """Bytes of a weight and of an activation."""
    return 2 if sample.use_mixed_precision == "bf16" else 4


def token_bytes(shape, weight):
    """Bytes for each token that a pass reads, at the largest moment of the largest layer."""
    return SMALL + max(layer_bytes(shape, layer, weight) for layer in shape.layers)


def layer_bytes(shape, layer, weight):
    """As token_bytes(), of one layer: the moments come one after the other."""
    D, Q, K = shape.width, shape.query_width, shape.key_width
    in_attention = weight * (2 * D + Q + 4 * K) + 22 * K  # models/llada.py rotates in float32
    in_mlp = weight * (4 * D + 3 * layer.mlp_width)
    in_experts = weight * (layer.chosen * (3 * D + layer.expert_width) + 4 * D)
    return max(in_attention, in_mlp, in_experts)


def passing_bytes(shape, sample):
    """Bytes of the weights that a pass brings to the card: gathered by ZeRO-3, or unpacked from 4 bits."""
    if not sample.deepspeed:
        return bytes_of_weight(sample) * shape.unpacked
    from training import deepspeed_config  # deepspeed's import is slow

    ds = deepspeed_config.read_ds_config(sample.deepspeed)
    e, machine = bytes_per_element(ds, model_arguments(sample)), Machine(0, 0, one_memory=sample.device == "cpu")
    return sum(size for _, size in parameter_items(shape, ds["zero_optimization"], e, placement(ds), machine))


def rows_that_fit(shape, sample, longest_row, room):
    """Rows of a forward pass that take at most `room` bytes, at least 1.

    More rows than give a pass ENOUGH tokens would only make results come later.
    """
    of_row, of_chunk = row_bytes(shape, sample, longest_row).total, drawing_bytes(shape, sample, 1)
    fitting = max(room // (of_row + of_chunk), (room - DRAWING * CHUNK_BYTES) // of_row)
    of_use = -(-ENOUGH // tokens_read(shape, sample, longest_row))
    return int(max(1, min(fitting, of_use)))


def batch_rows(shape, sample, longest_row, free_bytes):
    """--batch_size auto: the rows of a forward pass, at least 1.

    shape: sampled_shape(). sample: SampleArguments after arguments.check(). longest_row: tokens of the longest prompt
    and its response. free_bytes: what the device has left beside the weights (memory.memory_now()).
    """
    room = ROOM * (free_bytes - passing_bytes(shape, sample))
    return rows_that_fit(shape, sample, longest_row, room)
