"""The training step and the reference job on one card, random weights of the shapes that people have.

    python bench/gpu.py --vram_gb 16 [--rows NAME ...] [--json FILE]      a CUDA card, its memory capped
    python bench/gpu.py --device cpu --quick                              tiny shapes: shows that it runs, no more

Each row is a process of its own, with the engine, the score and the default estimator of train_dpo.py: a pair of
128 + 256 tokens, states_per_forward found as `auto` finds it, one step of two pairs to warm up, --steps timed.

pairs/s, tokens/s   tokens: prompt and response through the model, states times length, of both responses
TFLOP/s             of the arithmetic that is needed: forward, and twice that backward (once through frozen weights);
                    what is computed twice counts once
of peak             that, as a share of a bfloat16 matrix product's rate in the same process
bus                 parameters in and gradients out over the bus at a pinned copy's rate, as a share of the step
GPU, host GiB       peaks of the process
Below: the three largest costs of one step, by the profiler. A capped larger card stands in for a 4080's memory, never
for its speed or its bus. T denoising steps, R trajectories, S states.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from step import BETA, flops, wait

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from transformers.initialization import no_init_weights

import config
import files
import score
from cli import exits
from models import lora
from models.llada import LLaDAConfig, LLaDAModelLM
from scoring import losses, noise
from scoring.states import backward_passes, response_states, sizes
from training import deepspeed_config, engine, memory


class Shape(NamedTuple):
    width: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int


class Row(NamedTuple):
    shape: Shape
    kind: str  # score, train or lora
    ds_config: str  # where memory is


LLADA_8B = Shape(4096, 32, 32, 12288, 126464)
SMDM = Shape(1792, 20, 14, 7168, 32001)
HALF = Shape(1024, 24, 16, 4096, 32000)
TINY = Shape(64, 2, 4, 128, 512)
ROWS = {
    "8B-score": Row(LLADA_8B, "score", "zero3_offload_4080"),
    "1.1B-full": Row(SMDM, "train", "zero3_offload_4080"),
    "8B-LoRA": Row(LLADA_8B, "lora", "zero3_offload_4080"),
    "0.5B-full": Row(HALF, "train", "zero3_offload_4080"),
    "0.5B-full-zero2": Row(HALF, "train", "zero2_offload_4080"),
}
NOT_RUN = {"8B-full": "needs 96 to 160 GB of host memory (ds_configs/README.md)"}
PASSES = {"score": 1 / 3, "lora": 2 / 3, "train": 1}  # of forward, backward by inputs and backward by weights
PROMPT, RESPONSE, MASK, ACCUMULATE = 128, 256, 3, 2
BLANKS = {"bus": ".2f", "gpu_gib": ".1f"}  # columns that have no value on a CPU, and their form
T, R = config.NoiseArguments.diffusion_steps, config.NoiseArguments.trajectories


def random_model(shape, ds_config, dtype):
    """A LLaDA with normal weights; under ZeRO-3 partitioned from the start."""
    model_config = LLaDAConfig(
        d_model=shape.width,
        n_layers=shape.layers,
        n_heads=shape.heads,
        mlp_hidden_size=shape.mlp,
        vocab_size=shape.vocabulary,
        mask_token_id=MASK,
    )
    partitioned = contextlib.nullcontext()
    if ds_config["zero_optimization"]["stage"] == 3:
        partitioned = engine.deepspeed.zero.Init(config_dict_or_path=ds_config)
    with no_init_weights(), partitioned:
        model = LLaDAModelLM._from_config(model_config, dtype=dtype)
    for parameter in model.parameters():
        values = getattr(parameter, "ds_tensor", parameter).data
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 1:
            values.normal_(0, 0.02)
        else:
            values.fill_(1)
    return model.train()


def pair_of(vocabulary, prompt, response):
    """The States of a pair of random ids, by the default estimator."""
    rng, made = np.random.default_rng(0), []
    for _ in range(2):
        masked = noise.state_masks(response, "spread", T, R, rng)
        weight = noise.state_weights(masked, "spread", T, R)
        ids = rng.integers(10, vocabulary, prompt + response)
        made.append(response_states(ids[:prompt], ids[prompt:], masked, weight, MASK))
    return made


def zero_loss(scores):
    return 0.0 * sum(scores)


def dpo_loss(scores):
    return losses.sigmoid(scores[0] - scores[1], BETA)


class Work:
    """One row: its model in its engine, and its step."""

    def __init__(self, row, quick):
        self.ranks, self.kind, self.forwards, self.backwards = engine.start(), row.kind, 0, 0
        lengths = (8, 16) if quick else (PROMPT, RESPONSE)
        self.states = pair_of(row.shape.vocabulary, *lengths)
        self.S = len(self.states[0].inputs)
        ds_config = self.ds_config(ROOT / "ds_configs" / f"{row.ds_config}.json")
        self.streamed = ds_config["zero_optimization"]["stage"] == 3
        self.model = random_model(row.shape, ds_config, torch.bfloat16)
        self.parameters = sum(getattr(each, "ds_numel", each.numel()) for each in self.model.parameters())
        self.flops = flops(self.model, self.states)
        self.model.register_forward_hook(self.count)
        if self.kind != "score":
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        trained = lora.add(self.model, 16, 32, "auto", 0, "random")[0] if self.kind == "lora" else self.model
        self.engine = engine.build(trained, ds_config)
        rows = {size: size for size in sizes(self.S)} | {self.S: 2 * self.S}  # with all, both responses share a graph
        self.size = memory.largest_that_fits(rows, self.trial, self.ranks).size

    def ds_config(self, path):
        read, model_args = deepspeed_config.read_ds_config(path), config.ModelArguments()
        if self.kind == "score":
            return deepspeed_config.scoring_config(read, model_args)
        args = config.TrainArguments(gradient_accumulation_steps=ACCUMULATE)
        return deepspeed_config.training_config(read, args, model_args, ACCUMULATE * 2 * self.S, path)

    def count(self, *_):
        self.forwards += 1

    def backward(self, loss, last=False):
        self.backwards += 1
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def trial(self, size):
        if self.kind == "score":
            with torch.no_grad():
                return score.state_scores(self.engine, self.states[0].first(size), size, self.ranks.device)
        states = self.states if size == self.S else [self.states[0].first(size)]
        score.score_and_backward(self.engine, states, zero_loss, size, self.ranks.device, self.backward)

    def step(self):
        """One optimizer step of ACCUMULATE pairs, or the scores of as many."""
        if self.kind == "score":
            for _ in range(ACCUMULATE):
                self.score_pair()
        else:
            for pair in range(ACCUMULATE):
                self.train_pair(is_last=pair + 1 == ACCUMULATE)
            engine.step(self.engine)
        wait(self.ranks.device)

    def score_pair(self):
        with torch.no_grad():
            for states in self.states:
                score.state_scores(self.engine, states, self.size, self.ranks.device)

    def train_pair(self, is_last):
        left = backward_passes([self.S] * 2, [self.S] * 2, self.size)

        def backward(loss):
            nonlocal left
            left -= 1
            self.backward(loss, is_last and left == 0)

        score.score_and_backward(self.engine, self.states, dpo_loss, self.size, self.ranks.device, backward)


class Rates(NamedTuple):
    product: float  # FLOP/s of a bfloat16 matrix product
    copy: float  # bytes/s of a pinned copy to the card; None without one


def rates(device):
    """The Rates of this machine, the best of six."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 512
    matrix, product, copy = torch.randn(size, size, device=device, dtype=torch.bfloat16), 0, 0
    block = torch.empty(2**28 if cuda else 1, dtype=torch.uint8, pin_memory=cuda)
    for _ in range(6):
        began = time.perf_counter()
        matrix @ matrix
        wait(device)
        product = max(product, 2 * size**3 / (time.perf_counter() - began))
        if cuda:
            began = time.perf_counter()
            block.to(device, non_blocking=True)
            wait(device)
            copy = max(copy, len(block) / (time.perf_counter() - began))
    return Rates(product, copy or None)


def costs(work):
    """The three largest of one step's costs: [(name, share)]."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda := work.ranks.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work.step()
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    whole = sum(times.values())
    return [(name, value / whole) for name, value in sorted(times.items(), key=lambda item: -item[1])[:3]]


def worker(name, args):
    """Measure one row; print it as JSON."""
    if args.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.vram_gb * 2**30 / total))
    row = ROWS[name]
    work = Work(row._replace(shape=TINY) if args.quick else row, args.quick)
    rate = rates(work.ranks.device)
    work.step()
    work.forwards = work.backwards = 0
    began = time.perf_counter()
    for _ in range(args.steps):
        work.step()
    seconds = (time.perf_counter() - began) / args.steps
    needed = ACCUMULATE * work.flops * PASSES[work.kind]
    peaks = memory.memory_peaks(work.ranks.device)
    result = {
        "row": name,
        "parameters": work.parameters,
        "states_per_forward": work.size,
        "seconds": seconds,
        "pairs_per_second": ACCUMULATE / seconds,
        "tokens_per_second": ACCUMULATE * sum(states.inputs.size for states in work.states) / seconds,
        "tflops": needed / seconds / 1e12,
        "of_peak": needed / seconds / rate.product,
        "bus": rate.copy and bytes_moved(work) / args.steps / rate.copy / seconds,
        "gpu_gib": peaks[0],
        "host_gib": peaks[1],
        "costs": costs(work),
    }
    print(json.dumps(result))
    torch.distributed.destroy_process_group()


def bytes_moved(work):
    """Bytes over the bus since the counters were 0: parameters in for each pass, gradients out, 2 bytes each."""
    passes = work.forwards + work.backwards if work.streamed else 0
    gradients = work.backwards if work.kind == "train" else 0
    return 2 * work.parameters * (passes + gradients)


def show_head():
    print(
        f"{'row':<17}{'1e9 par':>7}{'states':>8}{'pairs/s':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'of peak':>9}{'bus':>6}"
        f"{'GPU GiB':>9}{'host GiB':>10}"
    )


def show(row):
    bus, gpu = ("-" if row[name] is None else format(row[name], form) for name, form in BLANKS.items())
    print(
        f"{row['row']:<17}{row['parameters'] / 1e9:7.2f}{row['states_per_forward']:8d}"
        f"{row['pairs_per_second']:9.3f}{row['tokens_per_second']:10.0f}{row['tflops']:9.3f}{row['of_peak']:9.3f}"
        f"{bus:>6}{gpu:>9}{row['host_gib']:10.1f}\n"
        f"{'':17} {', '.join(f'{name} {share:.0%}' for name, share in row['costs'])}",
        flush=True,
    )


def measure(name, args):
    """A row of the table, measured by a process of its own; {"row", "failed"} if that fails."""
    options = {"worker": name, "vram_gb": args.vram_gb, "steps": args.steps, "device": args.device}
    command = [sys.executable, __file__, *(f"--{option}={value}" for option, value in options.items())]
    command += ["--quick"] if args.quick else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"row": name, "failed": (done.stderr.strip() or "?").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vram_gb", type=float, default=16.0, help="use no more of the card's memory")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--json", help="write the table there")
    parser.add_argument("--worker", choices=list(ROWS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args.worker, args)
    if not args.quick and not (args.device == "cuda" and torch.cuda.is_available()):
        raise files.InputError(
            "bench/gpu.py measures a CUDA card, and there is none; to see that it runs: --device cpu --quick"
        )
    show_head()
    table = []
    for name in args.rows:
        table.append(measure(name, args))
        if "failed" in table[-1]:
            print(f"{name:<17} failed: {table[-1]['failed']}", flush=True)
        else:
            show(table[-1])
    for name, why in NOT_RUN.items():
        print(f"{name:<17} not measured: {why}")
    if args.json:
        result = {
            "table": table,
            "not_measured": NOT_RUN,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "vram_gb": args.vram_gb,
            "torch": torch.__version__,
            "deepspeed": engine.deepspeed.__version__,
        }
        files.write_json(args.json, result)
    return 1 if any("failed" in row for row in table) else 0


if __name__ == "__main__":
    exits.run(main)
