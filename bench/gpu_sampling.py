"""The sampler's speed on a card: a random LLaDA-8B, GSM8K's lengths, by cache and by where the weights are.

    python bench/gpu_sampling.py --vram_gb 16                 a CUDA card, its memory capped
    python bench/gpu_sampling.py --device cpu --quick         a tiny shape: shows that it runs, no more

Prints a line of JSON for each way as it is measured: seconds of a pass, rows that share one (--batch_size auto), tokens
that a pass reads, responses an hour at one token a pass. The passes of a block are timed, after some that warm up: one
of them reads whole rows, as in any block.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from gpu_rows import LLADA_8B, MASK, TINY, Row, cap_memory, random_model
from step import wait

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config
from reasoning import arguments, sampler
from training import deepspeed_config, engine, memory

PROMPT, RESPONSE, BLOCK = 144, 256, 32  # tokens
PASSES, WARM_UP = 32, 4  # a block's
WAYS = {  # name: (kind of weights, ds_config, cache)
    "4 bits": ("qlora", "zero0", "none"),
    "4 bits, prefix": ("qlora", "zero0", "prefix"),
    "4 bits, dual": ("qlora", "zero0", "dual"),
    "streamed, dual": ("lora", "zero3_offload_4080", "dual"),
}


class Enough(Exception):
    """So many passes were timed."""


class Clock:
    """Told of each pass, as a pace.Pace is."""

    def __init__(self, passes):
        self.left, self.seconds, self.tokens = passes + WARM_UP, [], []

    def begin(self, lengths, batch_size):
        pass

    def shrank(self, batch_size):
        pass

    def passed(self, seconds, tokens, rows):
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self.left -= 1
        if not self.left:
            raise Enough

    def ended(self, passes, tokens):
        pass


def built(kind, ds, shape, device):
    """The random model, streamed if it is to be."""
    path = ROOT / "ds_configs" / f"{ds}.json"
    ds_config = deepspeed_config.scoring_config(deepspeed_config.read_ds_config(path), config.ModelArguments())
    model = random_model(Row(shape, kind, ds), ds_config, device).eval().requires_grad_(False)
    return engine.build(model, ds_config) if ds.startswith("zero3") else model.to(device)


def measure(model, cache, sample, prompts):
    """{column: value} of one way."""
    sample.cache = cache
    size, special = sampler.batch_size(model, prompts, sample), sampler.special_ids(MASK, None, None)
    clock = Clock(PASSES)
    try:
        for _ in sampler.fill(model, prompts, sample, special, range(len(prompts)), size, clock):
            pass
    except Enough:
        wait(torch.device(sample.device))
    seconds = sum(clock.seconds[WARM_UP:]) / PASSES
    gpu, _ = memory.memory_peaks(torch.device(sample.device))
    return {
        "rows": size,
        "tokens_a_pass": sum(clock.tokens[WARM_UP:]) / PASSES,
        "seconds_a_pass": seconds,
        "responses_an_hour": 3600 * size / (seconds * sample.gen_length),
        "gpu_gib": gpu,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vram_gb", type=float, default=16.0, help="use no more of the card's memory")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny shape")
    args = parser.parse_args(argv)
    cap_memory(args)
    ranks, shape = engine.start(), TINY if args.quick else LLADA_8B
    prompts = list(torch.randint(10, shape.vocabulary, (8 if args.quick else 512, PROMPT)))
    began = time.perf_counter()
    for (kind, ds), ways in itertools.groupby(WAYS.items(), lambda way: way[1][:2]):
        model = built(kind, ds, shape, ranks.device)
        for name, (_, _, cache) in ways:
            streams = str(ROOT / "ds_configs" / f"{ds}.json") if ds.startswith("zero3") else None
            sample = config.SampleArguments(
                gen_length=RESPONSE, block_length=BLOCK, device=args.device, load_in_4bit=kind == "qlora"
            )
            arguments.check(sample)
            sample.deepspeed = streams
            row = {"way": name, **measure(model, cache, sample, prompts), "at": time.perf_counter() - began}
            print(json.dumps(row), flush=True)
        del model
        if args.device == "cuda":
            torch.cuda.empty_cache()
    engine.leave()


if __name__ == "__main__":
    main()
