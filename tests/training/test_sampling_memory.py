"""Tests of the memory of sampling: bytes of a pass against those of fake tensors, rows of a batch, their limits.

bash tests/run.sh tests/training/test_sampling_memory.py
"""

import sys

import pytest
import torch
from small import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import activations

import config
from models import architecture
from models.attention import Rows
from reasoning import commits
from training import sampling_memory
from training.sampling_memory import batch_rows, row_bytes, sampled_shape

GIB = 2**30


class TwoLayers(activations.Case):
    """A model of the full width: a pass without a graph holds one layer at a time."""

    @property
    def model_config(self):
        found = super().model_config
        found.num_hidden_layers = 2
        return found


def settled(**given):
    """SampleArguments as after arguments.check()."""
    sample = config.SampleArguments(device="cuda", gen_length=256, block_length=32)
    for name, value in {"cache": "none", **given}.items():
        setattr(sample, name, value)
    return sample


def shape_of(name, sample):
    return sampled_shape(architecture.load_config(str(activations.CONFIGS / name)), sample)


@pytest.mark.parametrize("name", ["llada_8b", "smdm_1b", "sdar_4b", "lladamoe_7b"])
def test_the_activations_of_a_pass_are_those_of_fake_tensors(name):
    """At most a fifth above, and not below."""
    case = TwoLayers(name, activations.CONFIGS / name, 0, False, "bf16")
    peaks = []
    with activations.fake():
        model = activations.fake_model(case).eval()
        for tokens in (1024, 2048):
            held = activations.Held([*model.parameters(), *model.buffers()])
            apart = {} if model.blocks else {"rows": Rows([tokens // 2] * 2, "cpu")}
            with torch.no_grad(), held:
                model(input_ids=torch.zeros((1, tokens), dtype=torch.int64), positions=torch.arange(1), **apart)
            peaks.append(held.peak)
    measured = (peaks[1] - peaks[0]) / 1024
    planned = sampling_memory.token_bytes(shape_of(name, settled()), 2)
    assert 0.999 <= planned / measured <= 1.2


def test_a_row_of_llada_8b():
    """Keys and values: 32 layers of 4096 each. Logits: 32 places of 126464."""
    plain = row_bytes(shape_of("llada_8b", settled()), settled(), 400)
    dual = row_bytes(shape_of("llada_8b", settled()), settled(cache="dual"), 400)
    assert plain.cache == 0 and dual.cache == 400 * 2 * 32 * 4096 * 2
    assert plain.logits == dual.logits == 32 * 126464 * 2
    guided = row_bytes(shape_of("llada_8b", settled()), settled(cfg_scale=0.5, cache="dual"), 400)
    assert guided.cache == 2 * dual.cache and guided.activations == 2 * dual.activations
    assert guided.logits == 5 * dual.logits


@pytest.mark.parametrize("guidance, threshold", [(0.0, 0.9), (0.5, None)])
def test_the_logits_of_a_pass_are_those_of_fake_tensors(guidance, threshold):
    """As reasoning/passes.py makes and reads them, at a temperature; 8 rows of 32 places, 800 with two chunks."""
    for rows in (8, 25):
        sample = settled(cfg_scale=guidance, threshold=threshold, temperature=0.7)
        shape, N = shape_of("llada_8b", sample), 32 * rows
        held = activations.Held([])
        with activations.fake(), torch.no_grad():
            uniforms, ends = torch.empty(N), torch.empty(2, dtype=torch.int64)
            with held:
                made = torch.empty(2 * N if guidance else N, shape.vocabulary, dtype=torch.bfloat16)
                if guidance:
                    c, u = made.chunk(2)
                    made = u + (guidance + 1) * (c - u)
                commits.predict(made, uniforms, sample, ends, never=3)
        planned = rows * row_bytes(shape, sample, 400).logits + sampling_memory.drawing_bytes(shape, sample, rows)
        assert 0.9 <= planned / held.peak <= 1.5


def test_block_causal_models_always_keep_keys_and_values():
    sample = settled(block_length=4)
    assert row_bytes(shape_of("sdar_4b", sample), sample, 400).cache == 400 * 2 * 36 * 8 * 128 * 2


def test_the_batch_fills_the_free_memory():
    """Twice the room beside the passing weights takes twice the rows or more."""
    sample = settled(cache="dual", load_in_4bit=True)
    shape = shape_of("llada_8b", sample)
    unpacked = sampling_memory.passing_bytes(shape, sample)
    assert unpacked == 2 * 2 * 4096 * 12288
    few, many = (batch_rows(shape, sample, 400, unpacked + room * GIB) for room in (4, 8))
    assert few > 1 and many >= 2 * few
    for rows, room in ((few, 4), (many, 8)):
        taken = rows * row_bytes(shape, sample, 400).total + sampling_memory.drawing_bytes(shape, sample, rows)
        assert 0.75 * room * GIB < taken <= 0.8 * room * GIB


def test_a_batch_has_a_row_at_least_and_no_more_tokens_than_are_of_use():
    sample = settled()
    shape = shape_of("llada_8b", sample)
    assert batch_rows(shape, sample, 400, 0) == 1
    assert batch_rows(shape, sample, 400, 1000 * GIB) == 21  # 8192 tokens
    assert batch_rows(shape, settled(cache="prefix"), 400, 1000 * GIB) == 32  # of 256 at most
    assert batch_rows(shape, settled(cache="dual"), 400, 1000 * GIB) == 256  # of 32


def test_streamed_weights_take_room_while_they_pass():
    """What plan.py counts of them: those that ZeRO-3 gathers at once, and those that the card still uses."""
    sample = settled(deepspeed=str(ROOT / "ds_configs" / "zero3_offload_4080.json"))
    shape = shape_of("llada_8b", sample)
    assert 2 * shape.largest_block * 2 < sampling_memory.passing_bytes(shape, sample) < 4 * GIB
    on_card = settled()
    assert batch_rows(shape, sample, 400, 4 * GIB) < batch_rows(shape, on_card, 400, 4 * GIB)
