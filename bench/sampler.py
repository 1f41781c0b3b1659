"""The sampler's approximations against itself: passes, tokens/s and accuracy on the same held-out problems.

    python bench/sampler.py [--model examples/tiny] [--task arithmetic] [--num 200] [--repeats 3] [--device cpu]

Plain is one token a pass. `steps` fixes fewer passes, `threshold` lets the confidence decide (Fast-dLLM,
arXiv 2505.22618). passes: forward passes per response, fewer than the steps where the text has ended before. tokens/s:
of the texts up to their end, in the fastest of the repeats, which take turns. Ratio: to the plain sampler of the same
block length.
"""

import argparse
import sys
import time
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from cli import exits
from config import SampleArguments
from files import InputError
from reasoning import arguments, prompts, sampler, tasks

GEN_LENGTH = 40
BLOCKS = (GEN_LENGTH, 8)
CHANGES = ({}, {"steps": 20}, {"steps": 10}, {"threshold": 0.9}, {"threshold": 0.8}, {"threshold": 0.6})
SETTINGS = [{"block_length": block} | change for block in BLOCKS for change in CHANGES]


class Run(NamedTuple):
    """One setting's answers to all problems."""

    seconds: float
    passes: float  # per response
    responses: list

    @property
    def rate(self):
        """Tokens per second."""
        return sum(response.tokens for response in self.responses) / self.seconds


class Bench:
    """Measures settings on the same prompts with one model, whose forward passes it counts."""

    def __init__(self, sample):
        self.sample = sample
        self.model, self.tokenizer = sampler.load(sample)
        self.rows = []  # of each forward pass
        self.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, model, positional, named):
        self.rows.append(len(named["rows"].lengths))

    def measure(self, setting, asked):
        sample = replace(self.sample, **setting)
        arguments.check(sample)
        self.rows.clear()
        started = time.perf_counter()
        responses = sampler.respond(self.model, self.tokenizer, asked, sample)
        return Run(time.perf_counter() - started, sum(self.rows) / len(asked), responses)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny"))
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--num", type=int, default=200, help="problems")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.task not in tasks.FAMILIES or args.num < 1 or args.repeats < 1:
        raise InputError(f"--task is one of {', '.join(tasks.FAMILIES)}; --num and --repeats are at least 1")
    sample = SampleArguments(
        model_name_or_path=args.model, use_mixed_precision="no", device=args.device, gen_length=GEN_LENGTH
    )
    bench = Bench(sample)
    problems = tasks.generate(args.num, "test", 0, (args.task,))
    asked = [prompts.prompt_ids(bench.tokenizer, {"prompt": each.prompt}, "problem", "auto") for each in problems]
    bench.measure(SETTINGS[0], asked[:8])  # warm up
    runs = []
    for _ in range(args.repeats):
        runs.append([bench.measure(setting, asked) for setting in SETTINGS])
    print(f"{args.num} {args.task} problems, gen_length {GEN_LENGTH}, batches of {sample.batch_size}, {args.device}")
    print(f"{'block':>5}  {'sampler':<14}{'passes':>8}{'tokens/s':>10}{'ratio':>7}  accuracy")
    for setting, *repeats in zip(SETTINGS, *runs):
        run = min(repeats, key=attrgetter("seconds"))
        block, *approximation = setting.items()
        if not approximation:
            plain = run
        name = " ".join(map(str, approximation[0])) if approximation else "plain"
        right = [tasks.verify(problem, response.text) for problem, response in zip(problems, run.responses)]
        print(
            f"{block[1]:5d}  {name:<14}{run.passes:8.1f}{run.rate:10.0f}{run.rate / plain.rate:7.2f}  "
            f"{tasks.solved_line(right)}",
            flush=True,
        )


if __name__ == "__main__":
    exits.run(main)
