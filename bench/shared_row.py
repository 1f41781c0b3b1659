"""The shared row of block-causal models against a row for each state: tokens and time of a pair, the same gradient.

    python bench/shared_row.py [--turns 3] [--json FILE] [--quick]
    python bench/shared_row.py --device cuda         attention alone: SDPA with a mask against FlexAttention

separate  a row for each state: the clean text up to the last block, and the response's blocks with its masks
shared    one row a response: the clean text once, and a copy of the response's blocks for each state
one by one  what a bidirectional model reads: each state as a row of prompt and response (counted, not run)

Random pairs on a random SDAR. Both ways fill passes of at most 8192 tokens. Seconds are the processor's, medians of
turns in which both ways are measured once; apart: the length of the gradient's difference as a share of its own.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch
from packed import gradient_of, loss, seconds
from scaling import by_turns
from step import add_gradient

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
from models import architecture, attention
from models.families import Blocks
from models.rows import SharedRow
from scoring import noise, passes, recipe
from scoring.states import States, response_states, tokens_of
from scoring.window import Piece

LENGTHS = [(100, 200), (512, 512)]  # prompt, response: GSM8K's, and a pair of 1024 tokens
BLOCKS = [(4, 4), (32, 4), (32, 8)]  # tokens of a block, states
MASK = 3
HEADS, KEY_HEADS, HEAD_WIDTH = 32, 8, 128  # of SDAR-4B, SDAR-8B and Nemotron-Labs-Diffusion


class Work:
    """A random model and the States of a pair, each way."""

    def __init__(self, prompt, response, size, S, width, layers, words):
        rng, blocks = np.random.default_rng(0), Blocks(size)
        self.model, self.pair = build(width, layers, words), []
        for n in (response, response):
            ids, divided = rng.integers(10, words, prompt + n), recipe.partition(prompt, n, blocks)
            masked = noise.state_masks(n, "elbo_stratified", S, 1, rng, **divided)
            weight = noise.state_weights(masked, "elbo_stratified", S, 1, **divided)
            self.pair.append(response_states(ids[:prompt], ids[prompt:], masked, weight, MASK, blocks))

    def add_gradient(self, way):
        """Of the pair's loss, in passes of at most passes.ENOUGH tokens. way: shared or separate."""
        if way == "shared":
            return add_gradient(self.model, [Piece(self.pair, loss)], passes.ENOUGH)
        sides = [[one_state(states, index) for index in states.live] for states in self.pair]
        count = len(sides[0])

        def loss_of(scores):
            return loss([sum(scores[:count]), sum(scores[count:])])

        return add_gradient(self.model, [Piece([*sides[0], *sides[1]], loss_of)], passes.ENOUGH)


def one_state(states, index):
    """The States of one state, which has a row of its own."""
    each = slice(index, index + 1)
    return States(states.inputs[each], states.targets[each], states.weight[each], blocks=states.blocks)


def build(width, layers, words):
    """A random SDAR."""
    config = architecture.SDARConfig(
        block_size=4,
        vocab_size=words,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64 or 1,
        head_dim=32,
    )
    torch.manual_seed(0)
    return architecture.build(config, torch.float32, shift=False)


def measure(prompt, response, size, S, args):
    """A row of the table."""
    work = Work(prompt, response, size, S, *((64, 1, 256) if args.quick else (256, 4, 4096)))
    add = {way: functools.partial(work.add_gradient, way) for way in ("separate", "shared")}
    gradients = {way: gradient_of(work, each) for way, each in add.items()}
    taken = by_turns(list(add), lambda way: seconds(add[way]), args.turns, 0)
    blocks = Blocks(size)
    return {
        "prompt": prompt,
        "response": response,
        "block": size,
        "states": S,
        "tokens_one_by_one": 2 * int(tokens_of(prompt, response, S, None)),
        "tokens_separate": 2 * S * int(tokens_of(prompt, response, 1, blocks)),
        "tokens_shared": int(sum(states.tokens for states in work.pair)),
        "seconds_separate": taken["separate"],
        "seconds_shared": taken["shared"],
        "apart": float((gradients["shared"] - gradients["separate"]).norm() / gradients["separate"].norm()),
    }


def show(row):
    counted = f"{row['tokens_one_by_one']:>11}{row['tokens_separate']:>10}{row['tokens_shared']:>8}"
    ratio = row["seconds_separate"] / row["seconds_shared"]
    fewer = row["tokens_separate"] / row["tokens_shared"]
    lengths = f"{row['prompt']:>6}{row['response']:>9}{row['block']:>6}{row['states']:>7}"
    print(f"{lengths} |{counted}{fewer:6.2f} | {ratio:6.2f}{row['apart']:9.1e}", flush=True)


# --- attention on a card ----------------------------------------------------------------------------------


def flex_attention(rows, blocks, device):
    """attend(q, k, v) of BlockRows by torch's FlexAttention, compiled for a card: the same rule, token by token."""
    from torch.nn.attention import flex_attention as flex

    row, copy = (
        torch.tensor(np.concatenate(each), device=device)
        for each in zip(*(numbers(number, shared) for number, shared in enumerate(rows)))
    )
    place = torch.tensor(np.concatenate([shared.places for shared in rows]), device=device)
    block = place // blocks.size

    def sees(_, __, query, key):
        is_own = (copy[query] == copy[key]) & (block[query] == block[key])
        is_earlier = (copy[key] == 0) & (block[key] < block[query])
        return (row[query] == row[key]) & (is_own | is_earlier)

    N = len(place)
    mask = flex.create_block_mask(sees, None, None, N, N, device=device)
    run = torch.compile(flex.flex_attention) if torch.device(device).type == "cuda" else flex.flex_attention
    return functools.partial(run, block_mask=mask, enable_gqa=True)


def numbers(number, shared):
    """(length,) each: the number of the row, and of each token's copy, 0 for the clean text."""
    copies = [np.full(len(places), copy) for copy, places in enumerate(shared.copies, 1)]
    copy = np.concatenate((np.zeros(shared.clean, int), *copies))
    return np.full(len(copy), number), copy


def rows_of(prompt, response, size, S, count):
    """SharedRows of `count` responses with all blocks in each copy."""
    first, end = prompt // size * size, prompt + response
    return [SharedRow((end - 1) // size * size, [np.arange(first, end)] * S) for _ in range(count)]


def attention_alone(prompt, response, size, S, device):
    """Milliseconds of a forward and backward pass of the attention of a full pass, SDPA and FlexAttention."""
    rows, blocks = rows_of(prompt, response, size, S, 1), Blocks(size)
    rows = rows * max(1, passes.ENOUGH // rows[0].length)
    N = sum(row.length for row in rows)
    made = [
        torch.randn(1, heads, N, HEAD_WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    found = {}
    ways = {"sdpa": attention.BlockRows(rows, blocks, device).attend, "flex": flex_attention(rows, blocks, device)}
    for name, attend in ways.items():
        for _ in range(3):  # the first compiles
            attend(*made).sum().backward()
        torch.cuda.synchronize()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(10):
            attend(*made).sum().backward()
        ended.record()
        torch.cuda.synchronize()
        found[name] = round(began.elapsed_time(ended) / 10, 2)
    return {"prompt": prompt, "response": response, "block": size, "states": S, "tokens": N} | found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model, the short pairs alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="write the table there")
    args = parser.parse_args(argv)
    cases = [(*lengths, *blocks) for lengths in LENGTHS[: 1 if args.quick else 2] for blocks in BLOCKS]
    table = []
    if args.device == "cuda":
        for case in cases:
            table.append(attention_alone(*case, args.device))
            print("  ".join(f"{name} {value:g}" for name, value in table[-1].items()), flush=True)
    else:
        print(
            f"{'prompt':>6}{'response':>9}{'block':>6}{'states':>7} | {'one by one':>10}{'separate':>10}{'shared':>8}"
            f"{'x':>6} | {'time x':>6}{'apart':>9}   (tokens of a pair; {torch.get_num_threads()} thread(s))"
        )
        for case in cases:
            table.append(measure(*case, args))
            show(table[-1])
    if args.json:
        files.write_json(args.json, {"table": table, "threads": torch.get_num_threads(), "torch": torch.__version__})


if __name__ == "__main__":
    main()
