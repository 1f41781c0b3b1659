"""The sampler of block-causal models with its cache and without: passes, tokens read and time, the same tokens said.

    python bench/sampler_cache.py [--turns 3] [--json FILE] [--quick]

uncached  each pass reads the row up to the current block's end, as LLaDA2.0's own sampler does
cached    each pass reads the current block, and its first the block before it, too
stored    passes of SDAR's own sampler, which reads each finished block in a pass of its own (counted, not run)

Random prompts on a random Qwen3, one token a pass. Seconds are the processor's, medians of turns in which both ways are
measured once.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
from packed import seconds
from scaling import by_turns
from shared_row import MASK, build

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
from config import SampleArguments
from models.families import Blocks
from reasoning import arguments, blockwise, sampler

CASES = [(100, 64, 4, 1), (100, 64, 32, 1), (100, 64, 4, 8), (400, 64, 4, 1), (400, 64, 32, 1)]
QUICK = [(21, 16, 4, 2)]  # prompt, response, tokens of a block, prompts of a batch


CACHED = blockwise.fill


def uncached(prompt, sample, special, generator, blocks):
    """blockwise.fill() that reads the whole row in each pass."""
    filling = CACHED(prompt, sample, special, generator, blocks)
    begin, _ = blockwise.span(len(prompt), sample.gen_length, blocks)
    read = next(filling)
    while True:
        seen = blockwise.visible(0, read.stop - blocks.size, read.stop, blocks, begin)
        prediction = yield read._replace(first=0, mask=seen)
        try:
            read = filling.send(prediction)
        except StopIteration as end:
            return end.value


class Work:
    """A random model and prompts, and what the last run read."""

    def __init__(self, prompt, response, size, batch, width, layers, words):
        self.model, self.tokens = build(width, layers, words), []
        self.model.blocks = Blocks(size)
        self.model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.prompts = torch.randint(10, words, (batch, prompt))
        self.sample = SampleArguments(gen_length=response, device="cpu")
        arguments.check(self.sample)
        self.sample.block_length = size

    def count(self, model, positional, named):
        self.tokens.append(named["input_ids"].numel())

    def generate(self, fill):
        self.tokens.clear()
        blockwise.fill = fill
        return sampler.generate(self.model, self.prompts, self.sample, MASK)


def measure(prompt, response, size, batch, args):
    """A row of the table."""
    work = Work(prompt, response, size, batch, *((64, 1, 256) if args.quick else (256, 4, 4096)))
    ways = {"uncached": functools.partial(work.generate, uncached), "cached": functools.partial(work.generate, CACHED)}
    said, read = {}, {}
    for way, generate in ways.items():
        said[way] = generate()
        read[way] = list(work.tokens)
    taken = by_turns(list(ways), lambda way: seconds(ways[way]), args.turns, 0)
    start, end = blockwise.span(prompt, response, work.model.blocks)
    return {
        "prompt": prompt,
        "response": response,
        "block": size,
        "batch": batch,
        "passes_stored": len(read["cached"]) + (end - start) // size + (start > 0),  # the prompt's too
        "passes_cached": len(read["cached"]),
        "passes_uncached": len(read["uncached"]),
        "tokens_cached": sum(read["cached"]),
        "tokens_uncached": sum(read["uncached"]),
        "seconds_cached": taken["cached"],
        "seconds_uncached": taken["uncached"],
        "is_same": bool(torch.equal(said["cached"], said["uncached"])),
    }


def show(row):
    passes = "".join(f"{row[f'passes_{way}']:9}" for way in ("stored", "uncached", "cached"))
    tokens = "".join(f"{row[f'tokens_{way}']:9}" for way in ("uncached", "cached"))
    times = "".join(f"{row[f'seconds_{way}']:9.2f}" for way in ("uncached", "cached"))
    ratio = row["seconds_uncached"] / row["seconds_cached"]
    same = "yes" if row["is_same"] else "no"
    print(
        f"{row['prompt']:6}{row['response']:9}{row['block']:6}{row['batch']:6} |{passes} |{tokens} |{times}{ratio:7.2f}"
        f"  {same}",
        flush=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one case")
    parser.add_argument("--json", help="write the table there")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(
        f"{'':27} |{'passes':>27} |{'tokens read':>18} |{'seconds':>18}\n"
        f"prompt response block batch |{'stored':>9}{'uncached':>9}{'cached':>9} |{'uncached':>9}{'cached':>9} |"
        f"{'uncached':>9}{'cached':>9}{'x':>7}  same tokens ({torch.get_num_threads()} thread(s))"
    )
    table = []
    for case in QUICK if args.quick else CASES:
        table.append(measure(*case, args))
        show(table[-1])
    if args.json:
        files.write_json(args.json, {"table": table, "threads": torch.get_num_threads(), "torch": torch.__version__})


if __name__ == "__main__":
    main()
