"""One row of bench/gpu.py's table: the training step of a random model, with what people with a 16 GB card would run.

    python bench/gpu_rows.py 8B-LoRA --vram_gb 16                    a CUDA card, its memory capped
    python bench/gpu_rows.py 8B-LoRA --device cpu --quick            a tiny shape: shows that it runs, no more

Prints the row as a line of JSON whenever more of it is known: when the model is built, when tokens_per_forward is
found, after each step, and with the largest costs at the end. So a run that is cut off still tells. The weights are
drawn on the card. T denoising steps, R trajectories, S states.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fetches import Fetches
from step import BETA, flops, wait
from torch.nn.functional import logsigmoid

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from transformers.initialization import no_init_weights

import config
import score
from models import lora, quantized
from models.llada import LLaDAConfig, LLaDAModelLM
from scoring import noise, passes
from scoring.states import States, response_states
from scoring.window import Piece
from training import deepspeed_config, engine, memory


class Shape(NamedTuple):
    width: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int


class Row(NamedTuple):
    shape: Shape
    kind: str  # a key of PASSES
    ds_config: str  # where memory is


LLADA_8B = Shape(4096, 32, 32, 12288, 126464)
SMDM = Shape(1792, 20, 14, 7168, 32001)
HALF = Shape(1024, 24, 16, 4096, 32000)
TINY = Shape(64, 2, 4, 128, 512)
ROWS = {
    "8B-LoRA": Row(LLADA_8B, "lora", "zero3_offload_4080"),
    "8B-QLoRA": Row(LLADA_8B, "qlora", "zero0"),
    "1.1B-full": Row(SMDM, "full", "zero2_offload_4080"),
    "0.5B-full": Row(HALF, "full", "zero2_offload_4080"),
}
PASSES = {"full": 1, "lora": 2 / 3, "qlora": 2 / 3}  # of forward, backward by inputs and backward by weights
GSM8K, QUICK = (100, 200, 16), (8, 16, 2)  # tokens of prompt and response; pairs of an optimizer step: the presets'
MASK = 3
DESIGN = noise.default_design()


# --- the model --------------------------------------------------------------------------------------------


def random_model(row, ds_config, device):
    """A LLaDA in bfloat16 with normal weights; partitioned from the start under ZeRO-3, in 4 bits for QLoRA."""
    shape, dtype = row.shape, torch.bfloat16
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
    if row.kind == "qlora":
        quantized.prepare(model, dtype)
    for parameter in model.parameters():
        draw(parameter, device)
    return model.train()


@torch.no_grad()
def draw(parameter, device):
    """Fill a parameter with numbers drawn on `device`: on a host, those of an 8B model take minutes."""
    part = getattr(parameter, "ds_tensor", parameter)
    values = torch.empty(part.shape, dtype=part.dtype, device=device)
    is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
    values = values.normal_(0, 0.02) if is_matrix else values.fill_(1)
    if part is parameter:
        parameter.data = values
        quantized.pack(parameter)
    else:
        part.data.copy_(values)


# --- the step ---------------------------------------------------------------------------------------------


def responses_of(vocabulary, prompt, response):
    """The States of a pair of random ids, by the default estimator."""
    rng, made = np.random.default_rng(0), []
    for _ in range(2):
        masked = noise.state_masks(response, *DESIGN, rng)
        weight = noise.state_weights(masked, *DESIGN)
        ids = rng.integers(10, vocabulary, prompt + response)
        made.append(response_states(ids[:prompt], ids[prompt:], masked, weight, MASK))
    return made


def zero_loss(scores):
    return 0.0 * sum(scores)


def dpo_loss(scores):
    return -logsigmoid(BETA * (scores[0] - scores[1]))


class Work:
    """One row: its model in its engine, and its step."""

    def __init__(self, row, quick):
        self.ranks, self.row, began = engine.start(), row, time.perf_counter()
        prompt, response, self.pairs = QUICK if quick else GSM8K
        self.responses = responses_of(row.shape.vocabulary, prompt, response)
        ds_config = self.ds_config(ROOT / "ds_configs" / f"{row.ds_config}.json", quick)
        model = random_model(row, ds_config, self.ranks.device)
        self.parameters = sum(map(quantized.numel, model.parameters()))
        self.flops = flops(model, self.responses) * PASSES[row.kind]
        model.activation_checkpointing_enable({"use_reentrant": False})
        if row.kind != "full":
            lora.add(model, 16, 32, "auto", 0, "random")
        self.engine = engine.build(model, ds_config)
        self.fetches = Fetches(self.engine.module) if ds_config["zero_optimization"]["stage"] == 3 else None
        self.seconds_to_build = time.perf_counter() - began

    def ds_config(self, path, quick):
        model_args = config.ModelArguments(lora_r=0 if self.row.kind == "full" else 16)
        args = config.TrainArguments(gradient_accumulation_steps=self.pairs)
        read = deepspeed_config.read_ds_config(path)
        if quick and read["zero_optimization"]["stage"] == 3:
            read["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return deepspeed_config.training_config(read, args, model_args, path)

    @property
    def tokens(self):
        """Tokens of a pair that go through the model."""
        return sum(states.inputs.size for states in self.responses)

    def fit(self):
        """Find tokens_per_forward as `auto` does."""
        first_row = States(*(part[:1] for part in self.responses[0][:3]))  # its response is all masked
        length = first_row.inputs.shape[1]

        def trial(tokens):
            piece = Piece([first_row] * (tokens // length), zero_loss)
            score.score_and_backward(self.engine, [piece], tokens, self.ranks, self.backward)

        most = max(length, min(self.tokens * self.pairs, max(self.tokens, passes.ENOUGH)))
        reserved = memory.first_step_bytes(self.engine)
        self.tokens_per_forward = memory.largest_that_fits(length, most, trial, self.ranks, reserved).size

    def backward(self, loss, is_last):
        self.engine.set_gradient_accumulation_boundary(is_last and self.is_training)
        self.engine.backward(loss, scale_wrt_gas=False)

    is_training = False  # a trial is no optimizer step

    def step(self):
        """One optimizer step. Returns its seconds."""
        self.is_training, began = True, time.perf_counter()
        pieces = [Piece(self.responses, dpo_loss, 1 / self.pairs)] * self.pairs
        score.score_and_backward(self.engine, pieces, self.tokens_per_forward, self.ranks, self.backward)
        engine.step(self.engine)
        wait(self.ranks.device)
        return time.perf_counter() - began


# --- what is measured -------------------------------------------------------------------------------------


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


def measured(work, seconds, rate):
    """The columns after steps of these `seconds`."""
    pairs = work.pairs * len(seconds) / sum(seconds)  # a second
    gpu, host = memory.memory_peaks(work.ranks.device)
    return {
        "steps": len(seconds),
        "pairs_per_second": pairs,
        "tokens_per_second": pairs * work.tokens,
        "tflops": pairs * work.flops / 1e12,
        "of_ceiling": pairs * work.flops / rate.product,
        **fetched(work.fetches, work.pairs * len(seconds)),
        "gpu_gib": gpu,
        "host_gib": host,
    }


def fetched(fetches, pairs):
    """What ZeRO-3 has fetched for so many pairs, in models, and the share of it that was not fetched ahead."""
    if fetches is None:
        return {"models_a_pair": 0, "on_demand": None}
    elements = fetches.ahead + fetches.on_demand
    return {"models_a_pair": elements / fetches.total / pairs, "on_demand": fetches.on_demand / max(elements, 1)}


def say(row, **more):
    row.update(more)
    print(json.dumps(row), flush=True)


def cap_memory(args):
    """Take no more of a card's memory than --vram_gb."""
    if args.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.vram_gb * 2**30 / total))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=list(ROWS))
    parser.add_argument("--vram_gb", type=float, default=16.0, help="use no more of the card's memory")
    parser.add_argument("--steps", type=int, default=2, help="that are timed, after one that warms up")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny shape")
    args = parser.parse_args(argv)

    # 1. Memory, model, engine
    cap_memory(args)
    row = ROWS[args.row]
    work = Work(row._replace(shape=TINY) if args.quick else row, args.quick)
    rate = rates(work.ranks.device)
    found = {"row": args.row, "parameters": work.parameters, "seconds_to_build": work.seconds_to_build}
    found["card"] = torch.cuda.get_device_name() if args.device == "cuda" else None
    say(found, ceiling_tflops=rate.product / 1e12, bus_gbs=rate.copy and rate.copy / 1e9)

    # 2. How many tokens fit, and a step that warms up
    work.fit()
    say(found, tokens_per_forward=work.tokens_per_forward, warm_up_seconds=work.step())

    # 3. The steps that are timed
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    with work.fetches or contextlib.nullcontext():
        for _ in range(args.steps):
            seconds.append(work.step())
            say(found, **measured(work, seconds, rate))
    say(found, costs=costs(work))
    engine.leave()


if __name__ == "__main__":
    main()
