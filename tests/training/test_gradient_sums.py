"""Tests of what a step's backward passes add up to in bfloat16, under a real DeepSpeed engine.

bash tests/run.sh tests/training/test_gradient_sums.py
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file is a script, too
from small import ds_config, execute

import config
from training import deepspeed_config, engine

BACKWARDS, SMALL = 64, 2.0**-10  # each pass after the first adds SMALL to 1: less than half a digit of bfloat16
CASES = {  # the gradients that the backward passes of each step add
    "many": [[1.0] + [SMALL] * (BACKWARDS - 1)],
    "skipped": [[1.0] * 3, [1.0, math.nan, 1.0], [1.0] * 3],
}


class Product(torch.nn.Module):
    """A score whose gradient is its input."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))

    def get_input_embeddings(self):
        """It has none to keep on the host."""

    def forward(self, slope):
        return (self.weight * slope).sum()


def norms(path, lora_r, steps):
    """The gradient's norm of each optimizer step."""
    args, model_args = config.TrainArguments(max_grad_norm=0.0), config.ModelArguments(lora_r=lora_r)
    read = deepspeed_config.read_ds_config(path)
    policy = engine.build(Product(), deepspeed_config.training_config(read, args, model_args, path))
    found = []
    for slopes in steps:
        for number, slope in enumerate(slopes):
            policy.set_gradient_accumulation_boundary(number + 1 == len(slopes))
            policy.backward(1.0 * policy(torch.full((64,), slope, dtype=torch.bfloat16)), scale_wrt_gas=False)
        found.append(engine.step(policy))
    return found


def main(zero2, zero3):
    """Print {case: norms}, from one process: DeepSpeed does not start twice in one."""
    engine.start()
    jobs = {
        "LoRA": (zero3, 16, CASES["many"]),
        "full": (zero3, 0, CASES["many"]),
        "LoRA, ZeRO-3": (zero3, 16, CASES["skipped"]),
        "LoRA, ZeRO-2": (zero2, 16, CASES["skipped"]),
    }
    print(json.dumps({name: norms(*job) for name, job in jobs.items()}))
    engine.leave()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    paths = [ds_config(folder / f"{name}.json", f"{name}_offload_4080") for name in ("zero2", "zero3")]
    done = execute([__file__, *paths])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_small_gradients_add_up(measured):
    """Under LoRA the sum is kept in float32; full training keeps it in bfloat16, where they are lost."""
    assert measured["LoRA"] == pytest.approx([8 * (1 + (BACKWARDS - 1) * SMALL)], rel=1e-4)
    assert measured["full"] == [8.0]


@pytest.mark.parametrize("case", ["LoRA, ZeRO-3", "LoRA, ZeRO-2"])
def test_a_skipped_step_leaves_nothing(measured, case):
    """The sum of a step whose gradient is not finite does not enter the next."""
    first, skipped, later = measured[case]
    assert first == later == 24 and not math.isfinite(skipped)


if __name__ == "__main__":
    main(*sys.argv[1:])
