"""Tests of bench/: each runs at small size and writes its table; what can be counted is counted again here. No timings.

bash tests/run.sh tests/bench/test_bench.py
"""

import json
import math
import sys

import pytest
import torch
from small import AVX512, ROOT, execute
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "bench"))

import gpu
import step

import score


def bench(name, tmp_path, *argv, code=0):
    """What bench/NAME.py wrote with --json, and what it printed."""
    path = tmp_path / f"{name}.json"
    done = execute([ROOT / "bench" / f"{name}.py", *argv, "--json", path])
    assert done.returncode == code, done.stderr[-3000:]
    return json.loads(path.read_text()) if code == 0 else None, done.stdout + done.stderr


def test_step(tmp_path):
    """The same gradient as a plain loop (the bench asserts it), less memory."""
    table, _ = bench("step", tmp_path, "--quick", "--turns", "1")
    headline = table["headline"]
    assert set(headline) == {"speedup", "memory_ratio", "calibrated_speedup"}
    assert headline["speedup"] > 0 and headline["calibrated_speedup"] > 0 and headline["memory_ratio"] < 1
    [row] = table["table"]
    assert row["ours"]["limit"] < row["ours"]["seconds"]  # nothing is faster than its arithmetic


@pytest.mark.parametrize("estimator, k", [("stepwise", 0), ("spread", 0), ("spread", 2)])
def test_needed_arithmetic(estimator, k):
    """flops() is what torch counts in the products of forward and backward, but for the logits that are made twice."""
    model = step.build(512, 32, 2, "cpu")
    states = step.Pair(model, 3, 5, 12, 512, "cpu").states(estimator, 3, 2, k)
    forwards = [(part, not k) for part in states]  # (States, whether it has a graph)
    forwards += [(part.graph, True) for part in states if k]
    counted = 0
    for which, graph in forwards:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(graph), sdpa_kernel(SDPBackend.MATH):
            total = score.state_scores(model, which, 16, "cpu").sum()
            if graph:
                total.backward()
        again = 2 * (which.weight != 0).sum() * 32 * 512 if graph else 0  # the head's logits, in the backward pass
        counted += counter.get_total_flops() - again
    assert step.flops(model, states) == pytest.approx(counted, rel=0.01)


@pytest.mark.long
def test_memory(tmp_path):
    table, said = bench("memory", tmp_path, "--states", "4", "12", "--length", "128")
    assert [row["states"] for row in table["table"]] == [4, 12] and table["largest_over_smallest"] >= 1
    assert all(0 < row["segmented_mib"] < row["joint_mib"] for row in table["table"]) and "largest / smallest" in said


@pytest.mark.long
def test_scaling(tmp_path):
    table, _ = bench("scaling", tmp_path, "--quick", "--turns", "1")
    assert [row["states"] for row in table["states"]] == [2, 4] and all(row["per_state"] > 0 for row in table["states"])
    assert [row["tokens"] for row in table["lengths"]] == [8, 16] and all(
        row["per_gflop"] > 0 for row in table["lengths"]
    )
    assert [(row["ranks"], row["pairs"]) for row in table["pairs"]] == [(1, 2), (1, 4), (2, 2), (2, 4)]


def test_gpu_on_a_cpu(tmp_path):
    """The script as it is, at tiny size; what is not here is named, nothing is invented for it."""
    rows = ["8B-score", "1.1B-full", "8B-LoRA"]
    table, said = bench("gpu", tmp_path, "--device", "cpu", "--quick", "--steps", "1", "--rows", *rows)
    assert [row["row"] for row in table["table"]] == rows and "failed" not in said
    most = 1 if AVX512 else math.inf
    for row in table["table"]:
        assert row["tflops"] > 0 and 0 < row["of_peak"] < most
        assert row["bus"] is None and row["gpu_gib"] is None
        assert row["states_per_forward"] == 7 and len(row["costs"]) == 3
        assert row["tokens_per_second"] == pytest.approx(row["pairs_per_second"] * 2 * 7 * 24)  # sides, states, tokens
        assert row["parameters"] == 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert "8B-full           not measured: needs 96 to 160 GB of host memory" in said


def test_gpu_shapes():
    """The parameters of the released models."""

    def parameters(shape):
        block = 4 * shape.width**2 + 3 * shape.width * shape.mlp + 2 * shape.width
        return 2 * shape.vocabulary * shape.width + shape.layers * block + shape.width

    assert parameters(gpu.LLADA_8B) == 8_015_581_184
    assert parameters(gpu.SMDM) == pytest.approx(1_142_367_744, rel=1e-4)  # its head has a row less


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_gpu_without_a_card(tmp_path):
    _, said = bench("gpu", tmp_path, code=2)
    assert "error: bench/gpu.py measures a CUDA card, and there is none" in said and "Traceback" not in said
