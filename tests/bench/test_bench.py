"""Tests of bench/: each runs at small size and writes its table; what can be counted is counted again here. No timings.

bash tests/run.sh tests/bench/test_bench.py
"""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from small import AVX512, ROOT, execute
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "bench"))

import gpu
import gpu_rows
import shared_row
import step

import score
from models import attention
from models.families import Blocks
from training.engine import Ranks


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
    states = step.Pair(model, 3, 5, 12, 512, torch.device("cpu")).states(estimator, 3, 2, k)
    forwards = [(part, not k) for part in states]  # (States, whether it has a graph)
    forwards += [(part.graph, True) for part in states if k]
    counted = 0
    for which, graph in forwards:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(graph), sdpa_kernel(SDPBackend.MATH):
            [scores] = score.state_scores(model, [which], 1000, Ranks(0, 1, torch.device("cpu")))
            total = scores.sum()
            if graph:
                total.backward()
        again = 2 * (which.weight != 0).sum() * 32 * 512 if graph else 0  # the head's logits, in the backward pass
        counted += counter.get_total_flops() - again
    assert step.flops(model, states) == pytest.approx(counted, rel=0.01)


@pytest.mark.long
def test_memory(tmp_path):
    table, said = bench("memory", tmp_path, "--states", "4", "12", "--length", "128", "--tokens_per_forward", "256")
    assert [row["states"] for row in table["table"]] == [4, 12] and table["largest_over_smallest"] >= 1
    assert all(0 < row["segmented_mib"] < row["joint_mib"] for row in table["table"]) and "largest / smallest" in said


def test_packed(tmp_path):
    """The same scores and gradients however the rows are divided, in float32."""
    found, _ = bench("packed", tmp_path, "--quick", "--turns", "1", "--tokens", "300", "5000")
    assert [row["way"] for row in found["table"]] == ["unpacked", "300", "5000"] * 2
    for row in found["table"]:
        assert row["scores_apart"] < 1e-4 and row["gradients_apart"] < 1e-5 and row["pairs_per_second"] > 0


def test_shared_row(tmp_path):
    """The same gradient with fewer tokens, which are counted as the rows have them."""
    found, _ = bench("shared_row", tmp_path, "--quick", "--turns", "1")
    assert len(found["table"]) == 3 and all(row["seconds_shared"] > 0 for row in found["table"])
    first = found["table"][0]  # 100 + 200 tokens, blocks of 4: the clean text is 296 tokens, a copy 200
    assert first["tokens_shared"] == 2 * (296 + 4 * 200) and first["tokens_separate"] == 2 * 4 * (296 + 200)
    assert first["tokens_one_by_one"] == 2 * 4 * 300
    assert all(row["apart"] < 1e-5 for row in found["table"])


def test_flex_attention_of_a_shared_row():
    """What the bench compares on a card computes the same."""
    blocks, rows = Blocks(4), shared_row.rows_of(5, 14, 4, 2, 2)
    N, rng = sum(row.length for row in rows), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, N, 16, generator=rng) for heads in (4, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not compiled here
        got = shared_row.flex_attention(rows, blocks, "cpu")(q, k, v)
    assert torch.allclose(got, attention.BlockRows(rows, blocks, "cpu").attend(q, k, v), atol=1e-5)


@pytest.mark.long
def test_scaling(tmp_path):
    table, _ = bench("scaling", tmp_path, "--quick", "--turns", "1")
    assert [row["states"] for row in table["states"]] == [2, 4] and all(row["per_state"] > 0 for row in table["states"])
    assert [row["tokens"] for row in table["lengths"]] == [8, 16] and all(
        row["per_gflop"] > 0 for row in table["lengths"]
    )
    assert [(row["ranks"], row["pairs"]) for row in table["pairs"]] == [(1, 2), (1, 4), (2, 2), (2, 4)]


def test_gpu_on_a_cpu(tmp_path):
    """The table at tiny size; what is not here is named, nothing is invented for it."""
    parts = ["--parts", "check", "parity", "table", "--rows", "8B-LoRA", "1.1B-full"]
    found, said = bench("gpu", tmp_path, "--device", "cpu", "--quick", "--steps", "1", *parts)
    assert any(line.startswith("host memory") for line in found["check"]) and not found["steps"]
    assert {row["what"] for row in found["parity"]} == {"logits", "log-probabilities", "rows end to end", "windows"}
    assert all(row["ok"] for row in found["parity"]) and found["parity"][0]["checkpoint"] == "tiny"
    assert [row["row"] for row in found["table"]] == ["8B-LoRA", "1.1B-full"] and "failed" not in said
    most = 1 if AVX512 else math.inf
    for row in found["table"]:
        assert row["tflops"] > 0 and 0 < row["of_ceiling"] < most
        assert row["gpu_gib"] is None and row["bus_gbs"] is None and row["card"] is None
        assert row["tokens_per_forward"] == 2 * 2 * 4 * 24 and len(row["costs"]) == 3  # pairs, sides, states, tokens
        assert row["tokens_per_second"] == pytest.approx(row["pairs_per_second"] * 2 * 4 * 24)
        assert row["parameters"] == 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    streamed, stays = found["table"]
    assert 0 < streamed["models_a_pair"] <= 1 and streamed["on_demand"] < 0.1  # both pairs in one pass, twice
    assert stays["models_a_pair"] == 0 and stays["on_demand"] is None
    assert "8B-full     not measured: needs 96 to 160 GB of host memory" in said


@pytest.mark.long
def test_gpu_steps_on_a_cpu(tmp_path):
    """Full training, LoRA and SFT, by the scripts themselves, twice."""
    found, _ = bench("gpu", tmp_path, "--device", "cpu", "--quick", "--parts", "steps")
    assert [row["case"] for row in found["steps"]] == ["full, zero3 offload", "LoRA, zero0", "SFT, zero0"]
    for row in found["steps"]:
        assert row["ok"] and len(row["here"]["loss"]) == 2 and row["apart"] == {"loss": 0, "grad_norm": 0}


@pytest.mark.gpu
def test_gpu_parity_and_steps(tmp_path):
    """Logits and two steps of every kind of training are on the card what they are on the CPU."""
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--parts", "parity", "steps", "--json", tmp_path / "gpu.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "cuda" and found["parity"] and len(found["steps"]) > 3


@pytest.mark.long
def test_gpu_sampling_on_a_cpu(tmp_path):
    """A cache reads fewer tokens a pass: one whole row in a block of 32 tokens, and what it leaves of the others."""
    found, _ = bench("gpu", tmp_path, "--device", "cpu", "--quick", "--parts", "sampling")
    ways = {row["way"]: row for row in found["sampling"]}
    assert ways["4 bits"]["tokens_a_pass"] == 8 * 400
    assert ways["4 bits, dual"]["tokens_a_pass"] == 8 * (400 + 31 * 32) / 32 == ways["streamed, dual"]["tokens_a_pass"]
    assert ways["4 bits, prefix"]["tokens_a_pass"] > 4 * ways["4 bits, dual"]["tokens_a_pass"]


def test_gpu_out_of_time(tmp_path):
    """What no longer fits is named, and nothing is begun."""
    found, said = bench("gpu", tmp_path, "--device", "cpu", "--quick", "--minutes", "0.1")
    assert found["table"] == [] and set(found["not_measured"]) == {"8B-full", *gpu.LIMITS, *gpu.ROWS}
    assert "8B-QLoRA    not measured: no time was left of --minutes 0.1" in said


def test_gpu_cut_off():
    """What a part said before its time was over is kept."""
    lines = []
    code = "print(1)\nimport time\ntime.sleep(60)"
    assert gpu.follow(["-c", code], 5, lines.append) == "cut off after 5 s" and lines == ["1"]
    assert gpu.follow(["-c", "raise SystemExit('no card')"], 60, lines.append) == "exit code 1: no card"


def test_gpu_comparisons():
    """A number that is missing or apart is seen."""
    assert gpu.furthest([1.0, 2.0], [1.0, 2.2]) == pytest.approx(0.2 / 2.2)
    assert gpu.furthest([1.0], [1.0, 2.0]) == gpu.furthest([None], [1.0]) == math.inf
    report = gpu.Report(None)
    gpu.compare({"case": "full", "loss": [1.0], "grad_norm": [1.0]}, {"loss": [1.0], "grad_norm": [1.1]}, report)
    gpu.compare({"case": "full", "loss": [1.0], "grad_norm": [1.0]}, {"failed": "out of memory"}, report)
    assert report.too_far("steps") == "2 comparison(s) out of bounds"


def test_gpu_shapes():
    """The parameters of the released models."""

    def parameters(shape):
        block = 4 * shape.width**2 + 3 * shape.width * shape.mlp + 2 * shape.width
        return 2 * shape.vocabulary * shape.width + shape.layers * block + shape.width

    assert parameters(gpu_rows.LLADA_8B) == 8_015_581_184
    assert parameters(gpu_rows.SMDM) == pytest.approx(1_142_367_744, rel=1e-4)  # its head has a row less
    assert list(gpu_rows.ROWS) == list(gpu.ROWS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_gpu_without_a_card(tmp_path):
    _, said = bench("gpu", tmp_path, code=2)
    assert "error: bench/gpu.py measures a CUDA card, and there is none" in said and "Traceback" not in said


def test_sampler_cache(tmp_path):
    """The same tokens in as many passes, each of which reads a block or two."""
    found, _ = bench("sampler_cache", tmp_path, "--quick", "--turns", "1")
    [row] = found["table"]  # 2 prompts of 21 tokens, 16 more, blocks of 4
    assert row["is_same"] and row["passes_cached"] == row["passes_uncached"] < row["passes_stored"]
    assert row["tokens_cached"] < row["tokens_uncached"] / 3 and row["seconds_cached"] > 0
