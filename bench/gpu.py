"""The training step and the reference job on one card, random weights of the shapes that people have.

    python bench/gpu.py --vram_gb 16 [--rows NAME ...] [--json FILE]      a CUDA card, its memory capped
    python bench/gpu.py --device cpu --quick                              tiny shapes: shows that it runs, measures nothing of use

Each row is a process of its own, with the engine, the score and the default estimator of train_dpo.py: a pair of 128 + 256
tokens, states_per_forward found as `auto` finds it, one step of two pairs to warm up, --steps timed.

pairs/s, tokens/s   tokens: prompt and response through the model, states times length, of both responses
TFLOP/s             of the arithmetic that is needed: forward, and twice that backward (once through frozen weights); what is
                    computed twice counts once
of peak             that, as a share of a bfloat16 matrix product's rate in the same process
bus                 parameters in and gradients out over the bus at a pinned copy's rate, as a share of the step
GPU, host GiB       peaks of the process
Below: the three largest costs of one step, by the profiler. A capped larger card stands in for a 4080's memory, never for its
speed or its bus.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from step import BETA, flops, wait

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from transformers.initialization import no_init_weights  # noqa: E402

import config
import files

# noqa: E402
import score  # noqa: E402
from cli import exits
from models import lora  # noqa: E402
from models.llada import LLaDAConfig, LLaDAModelLM  # noqa: E402
from scoring import noise  # noqa: E402
from scoring.losses import preference_loss  # noqa: E402
from scoring.states import backward_passes, response_states, sizes  # noqa: E402
from training import (
    deepspeed_config,
    engine,  # noqa: E402
    memory,
)

# width, layers, heads, MLP, vocabulary
LLADA_8B, SMDM, HALF = (4096, 32, 32, 12288, 126464), (1792, 20, 14, 7168, 32001), (1024, 24, 16, 4096, 32000)
TINY = (64, 2, 4, 128, 512)
ROWS = {  # shape, what is done, where memory lives
    "8B-score": (LLADA_8B, "score", "zero3_offload_4080"),
    "1.1B-full": (SMDM, "train", "zero3_offload_4080"),
    "8B-LoRA": (LLADA_8B, "lora", "zero3_offload_4080"),
    "0.5B-full": (HALF, "train", "zero3_offload_4080"),
    "0.5B-full-zero2": (HALF, "train", "zero2_offload_4080"),
}
NOT_RUN = {"8B-full": "needs 96 to 160 GB of host memory (ds_configs/README.md)"}
PROMPT, RESPONSE, MASK, ACCUMULATE = 128, 256, 3, 2
T, R = config.NoiseArguments.diffusion_steps, config.NoiseArguments.trajectories


def random_model(shape, ds_config, dtype):
    """A LLaDA with normal weights; under ZeRO-3 partitioned from the start."""
    width, layers, heads, mlp, vocabulary = shape
    made = LLaDAConfig(
        d_model=width, n_layers=layers, n_heads=heads, mlp_hidden_size=mlp, vocab_size=vocabulary, mask_token_id=MASK
    )
    build = contextlib.nullcontext()
    if ds_config["zero_optimization"]["stage"] == 3:
        build = engine.deepspeed.zero.Init(config_dict_or_path=ds_config)
    with no_init_weights(), build:
        model = LLaDAModelLM._from_config(made, dtype=dtype)
    for parameter in model.parameters():
        values = getattr(parameter, "ds_tensor", parameter).data
        values.normal_(0, 0.02) if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 else values.fill_(1)
    return model.train()


def pair_of(vocabulary, prompt, response):
    """The States of a pair of random ids, by the default estimator."""
    rng, made = np.random.default_rng(0), []
    for _ in range(2):
        masked = noise.state_masks(response, "spread", T, R, rng)
        ids = rng.integers(10, vocabulary, prompt + response)
        made.append(
            response_states(ids[:prompt], ids[prompt:], masked, noise.state_weights(masked, "spread", T, R), MASK)
        )
    return made


class Work:
    """One row: its model in its engine, and its step."""

    def __init__(self, shape, kind, where, quick):
        self.ranks, self.kind, self.forwards, self.backwards = engine.start(), kind, 0, 0
        self.states = pair_of(shape[-1], *((8, 16) if quick else (PROMPT, RESPONSE)))
        self.S = len(self.states[0].inputs)
        model_args, path = config.ModelArguments(), ROOT / "ds_configs" / f"{where}.json"
        ds_config = deepspeed_config.read_ds_config(path)
        if kind == "score":
            ds_config = deepspeed_config.scoring_config(ds_config, model_args)
        else:
            args = config.TrainArguments(gradient_accumulation_steps=ACCUMULATE)
            ds_config = deepspeed_config.training_config(ds_config, args, model_args, ACCUMULATE * 2 * self.S, path)
        self.model = random_model(shape, ds_config, torch.bfloat16)
        self.parameters = sum(
            getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.model.parameters()
        )
        self.streamed = ds_config["zero_optimization"]["stage"] == 3
        self.flops = flops(self.model, self.states)
        self.model.register_forward_hook(self.count)
        if kind != "score":
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        trained = lora.add(self.model, 16, 32, "auto", 0, "random")[0] if kind == "lora" else self.model
        self.engine = engine.build(trained, ds_config)
        rows = {size: 2 * size if size == self.S else size for size in sizes(self.S)}
        self.size = memory.largest_that_fits(rows, self.trial, self.ranks).size

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
        score.score_and_backward(
            self.engine, states, lambda scores: 0.0 * sum(scores), size, self.ranks.device, self.backward
        )

    def step(self):
        """One optimizer step of ACCUMULATE pairs, or the scores of as many."""
        each = backward_passes([self.S] * 2, [self.S] * 2, self.size)
        for pair in range(ACCUMULATE):
            if self.kind == "score":
                with torch.no_grad():
                    for states in self.states:
                        score.state_scores(self.engine, states, self.size, self.ranks.device)
                continue
            left = iter(range(each, 0, -1))
            score.score_and_backward(
                self.engine,
                self.states,
                lambda scores: preference_loss(scores[0] - scores[1], BETA),
                self.size,
                self.ranks.device,
                lambda loss: self.backward(loss, pair + 1 == ACCUMULATE and next(left) == 1),
            )
        if self.kind != "score":
            engine.step(self.engine)
        wait(self.ranks.device)


def rates(device):
    """(FLOP/s of a bfloat16 matrix product, bytes/s of a pinned copy to the card or None), the best of five."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 512
    a, product, copy = torch.randn(size, size, device=device, dtype=torch.bfloat16), 0, 0
    block = torch.empty(2**28 if cuda else 1, dtype=torch.uint8, pin_memory=cuda)
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        wait(device)
        product = max(product, 2 * size**3 / (time.perf_counter() - began))
        if cuda:
            began = time.perf_counter()
            block.to(device, non_blocking=True)
            wait(device)
            copy = max(copy, len(block) / (time.perf_counter() - began))
    return product, copy or None


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
    shape, kind, where = ROWS[name]
    work = Work(TINY if args.quick else shape, kind, where, args.quick)
    product, copy = rates(work.ranks.device)
    work.step()
    work.forwards = work.backwards = 0
    began = time.perf_counter()
    for _ in range(args.steps):
        work.step()
    seconds = (time.perf_counter() - began) / args.steps
    need = (
        ACCUMULATE * work.flops * {"score": 1 / 3, "lora": 2 / 3, "train": 1}[kind]
    )  # forward; through frozen weights; with their gradients
    gradients = work.backwards if kind == "train" else 0
    moved = 2 * work.parameters * (gradients + (work.forwards + work.backwards if work.streamed else 0)) / args.steps
    gpu, host = memory.memory_peaks(work.ranks.device)
    print(
        json.dumps(
            {
                "row": name,
                "parameters": work.parameters,
                "states_per_forward": work.size,
                "seconds": seconds,
                "pairs_per_second": ACCUMULATE / seconds,
                "tokens_per_second": ACCUMULATE * sum(s.inputs.size for s in work.states) / seconds,
                "tflops": need / seconds / 1e12,
                "of_peak": need / seconds / product,
                "bus": copy and moved / copy / seconds,
                "gpu_gib": gpu,
                "host_gib": host,
                "costs": costs(work),
            }
        )
    )
    torch.distributed.destroy_process_group()


def show(row):
    dash = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    print(
        f"{row['row']:<17}{row['parameters'] / 1e9:7.2f}{row['states_per_forward']:8d}{row['pairs_per_second']:9.3f}{row['tokens_per_second']:10.0f}"
        f"{row['tflops']:9.3f}{row['of_peak']:9.3f}{dash(row['bus'], '.2f'):>6}{dash(row['gpu_gib'], '.1f'):>9}{row['host_gib']:10.1f}\n"
        f"{'':17} {', '.join(f'{name} {share:.0%}' for name, share in row['costs'])}",
        flush=True,
    )


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
    print(
        f"{'row':<17}{'1e9 par':>7}{'states':>8}{'pairs/s':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'of peak':>9}{'bus':>6}{'GPU GiB':>9}{'host GiB':>10}"
    )
    table = []
    for name in args.rows:
        command = [
            sys.executable,
            __file__,
            "--worker",
            name,
            "--vram_gb",
            str(args.vram_gb),
            "--steps",
            str(args.steps),
            "--device",
            args.device,
            *(["--quick"] if args.quick else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            table.append({"row": name, "failed": (done.stderr.strip() or "?").splitlines()[-1]})
            print(f"{name:<17} failed: {table[-1]['failed']}", flush=True)
        else:
            table.append(json.loads(done.stdout.splitlines()[-1]))
            show(table[-1])
    for name, why in NOT_RUN.items():
        print(f"{name:<17} not measured: {why}")
    if args.json:
        card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        files.write_json(
            args.json,
            {
                "table": table,
                "not_measured": NOT_RUN,
                "device": card,
                "vram_gb": args.vram_gb,
                "torch": torch.__version__,
                "deepspeed": engine.deepspeed.__version__,
            },
        )
    return 1 if any("failed" in row for row in table) else 0


if __name__ == "__main__":
    exits.run(main)
