"""The sampler's approximations against itself: passes, tokens/s and accuracy on the same held-out problems, in one process.

    python bench/sampler.py [--model examples/tiny] [--task arithmetic] [--num 200] [--repeats 3] [--device cpu]

Plain is one token a pass. `steps` fixes fewer passes, `threshold` lets the confidence decide (Fast-dLLM, arXiv 2505.22618).
passes: forward passes per response, fewer than the steps where the text is settled before. tokens/s: of the texts, without
what follows their end; of the fastest of the repeats, which take turns. Ratio: to the plain sampler, same block length.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import exits
from config import SampleArguments  # noqa: E402
from files import InputError  # noqa: E402

# noqa: E402
from reasoning import (
    prompts,  # noqa: E402
    sampler,
    tasks,  # noqa: E402
)

GEN_LENGTH = 40
SETTINGS = [
    ({"block_length": block} | change)
    for block in (GEN_LENGTH, 8)
    for change in (
        {},
        {"steps": GEN_LENGTH // 2},
        {"steps": GEN_LENGTH // 4},
        {"threshold": 0.9},
        {"threshold": 0.8},
        {"threshold": 0.6},
    )
]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "examples" / "tiny"))
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
    model, tokenizer = sampler.load(sample)
    problems = tasks.generate(args.num, "test", 0, (args.task,))
    asked = [prompts.prompt_ids(tokenizer, {"prompt": each.prompt}, "problem", "auto") for each in problems]
    passes = []  # rows of each forward pass
    model.register_forward_pre_hook(lambda _, __, inputs: passes.append(len(inputs["input_ids"])), with_kwargs=True)

    def measure(setting, asked):
        """(seconds, passes per response, responses)"""
        settled = replace(sample, **setting)
        sampler.check(settled)
        passes.clear()
        started = time.perf_counter()
        responses = sampler.respond(model, tokenizer, asked, settled)
        return time.perf_counter() - started, sum(passes) / len(asked), responses

    measure(SETTINGS[0], asked[:8])  # warm
    runs = [[measure(setting, asked) for setting in SETTINGS] for _ in range(args.repeats)]
    print(f"{args.num} {args.task} problems, gen_length {GEN_LENGTH}, batches of {sample.batch_size}, {args.device}")
    print(f"{'block':>5}  {'sampler':<14}{'passes':>8}{'tokens/s':>10}{'ratio':>7}  accuracy")
    for setting, *column in zip(SETTINGS, *runs):
        seconds, count, responses = min(column, key=lambda run: run[0])
        rate = sum(response.tokens for response in responses) / seconds
        block, *name = setting.values()
        if not name:
            plain = rate
        label = f"{list(setting)[1]} {name[0]}" if name else "plain"
        right = [tasks.verify(problem, response.text) for problem, response in zip(problems, responses)]
        print(
            f"{block:5d}  {label:<14}{count:8.1f}{rate:10.0f}{rate / plain:7.2f}  {tasks.solved_line(right)}",
            flush=True,
        )


if __name__ == "__main__":
    exits.run(main)
