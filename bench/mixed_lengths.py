"""Prompts of many lengths in a batch against prompts of one length: the same responses as one by one, and the time.

    python bench/mixed_lengths.py [--turns 5] [--num 64] [--json FILE] [--quick]

The prompts are problems of the embedded task: `equal` of one length, `mixed` half of them shorter, half as much longer,
so that as many tokens are read. No response ends early (--logits_eos_inf). Seconds are medians of turns in which every
way is measured once; x: mixed / equal.
"""

import argparse
import functools
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
from config import SampleArguments
from models.tokenization import load_tokenizer
from reasoning import arguments, sampler, tasks


def prompts(count, tokenizer):
    """(equal, mixed): `count` prompts each, lists of ids, with as many tokens altogether."""
    found = tokenizer([problem.prompt for problem in tasks.generate(40 * count, "test", 0)]).input_ids
    [(middle, _)] = Counter(map(len, found)).most_common(1)
    by_length = {}
    for ids in found:
        by_length.setdefault(len(ids), []).append(ids)
    equal, mixed = by_length[middle][:count], []
    for ids in found:
        twins = by_length.get(2 * middle - len(ids), [])
        if len(ids) < middle and twins and len(mixed) < count:
            mixed += [ids, twins.pop()]
    if len(equal) < count or len(mixed) < count:
        raise ValueError(f"{len(equal)} and {len(mixed)} prompts were found, expected {count}")
    return equal, mixed


def measure(batch_size, asked, args):
    """A row of the table. asked: {"equal": prompts, "mixed": prompts}."""
    sample = SampleArguments(
        model_name_or_path=str(ROOT / "examples" / "tiny"),
        use_mixed_precision="no",
        device="cpu",
        gen_length=16 if args.quick else 40,
        block_length=8,
        logits_eos_inf=True,
        batch_size=batch_size,
    )
    arguments.check(sample)
    respond = functools.partial(sampler.respond, *sampler.load(sample), sample=sample)
    texts, wall, processor = {}, {way: [] for way in asked}, {way: [] for way in asked}
    for _ in range(args.turns):
        for way, prompts in asked.items():
            began, processor_began = time.perf_counter(), time.process_time()
            texts[way] = [response.text for response in respond(prompts)]
            wall[way].append(time.perf_counter() - began)
            processor[way].append(time.process_time() - processor_began)
    alone = [respond([ids])[0].text for ids in asked["mixed"]]
    return {
        "batch_size": batch_size,
        "lengths": len(set(map(len, asked["mixed"]))),
        "wall": {way: statistics.median(seconds) for way, seconds in wall.items()},
        "processor": {way: statistics.median(seconds) for way, seconds in processor.items()},
        "is_same": texts["mixed"] == alone,
    }


def show(row):
    times = ""
    for clock in ("wall", "processor"):
        equal, mixed = row[clock]["equal"], row[clock]["mixed"]
        times += f"{equal:8.2f}{mixed:8.2f}{mixed / equal:6.2f} |"
    print(f"{row['batch_size']:10}{row['lengths']:8} |{times} {'yes' if row['is_same'] else 'no'}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--num", type=int, default=64, help="prompts")
    parser.add_argument("--quick", action="store_true", help="responses of 16 tokens, batches of 8 alone")
    parser.add_argument("--json", help="write the table there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(str(ROOT / "examples" / "tiny"))
    asked = dict(zip(("equal", "mixed"), prompts(args.num, tokenizer)))
    print(
        f"{args.num} prompts, one thread\n{'':18} |{'wall seconds':>22} |{'processor seconds':>22} |\n"
        f"batch_size lengths |{'equal':>8}{'mixed':>8}{'x':>6} |{'equal':>8}{'mixed':>8}{'x':>6} | as one by one"
    )
    table = []
    for batch_size in [8] if args.quick else [8, 32]:
        table.append(measure(batch_size, asked, args))
        show(table[-1])
    if args.json:
        files.write_json(args.json, {"table": table, "torch": torch.__version__})


if __name__ == "__main__":
    main()
