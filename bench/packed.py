"""Forward passes full of tokens against a pass for each response: pairs a second, and the same scores and gradients.

    python bench/packed.py [--tokens 1024 4096 8192] [--turns 3] [--json FILE] [--quick]

unpacked  a forward pass for the states of each response; the two of a pair share a backward pass
packed    rows of both responses and of several pairs end to end, at most so many tokens a pass (--tokens_per_forward)

Pairs of an optimizer step: the first of examples/prefs.jsonl on the embedded model, and random ones of GSM8K's length
(60 to 140 tokens of prompt, 120 to 280 of a response) on a random LLaDA. Seconds are the processor's, medians of turns
in which every way is measured once; x: pairs a second over unpacked. apart: the largest difference of a state's score,
and the length of the gradient's difference as a share of its own. float32 on a CPU.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scaling import by_turns
from step import BETA, MASK, add_gradient, build
from torch.nn.functional import logsigmoid

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
import score
from models import checkpoint, tokenization
from scoring import noise
from scoring.states import response_states
from scoring.window import Piece
from training.engine import Ranks

TINY = ROOT / "examples" / "tiny"
CPU = torch.device("cpu")
T, R = 3, 3


class Work(NamedTuple):
    name: str
    model: Any
    pairs: list  # [States of chosen, States of rejected] of each


def loss(scores):
    return -logsigmoid(BETA * (scores[0] - scores[1]))


def states_of(prompt, sides, rng):
    """[States] of a pair's responses by spread."""
    made = []
    for side in sides:
        masked = noise.state_masks(len(side), "spread", T, R, rng)
        made.append(response_states(prompt, side, masked, noise.state_weights(masked, "spread", T, R), MASK))
    return made


def embedded(count, rng):
    """The first pairs of examples/prefs.jsonl on the embedded model."""
    tokenizer, pairs = tokenization.load_tokenizer(str(TINY)), []
    with open(ROOT / "examples" / "prefs.jsonl", encoding="utf-8") as file:
        for line, _ in zip(file, range(count)):
            row = json.loads(line)
            ids = [np.array(tokenizer(row[name])["input_ids"]) for name in ("prompt", "chosen", "rejected")]
            pairs.append(states_of(ids[0], ids[1:], rng))
    return Work("embedded", checkpoint.load_model(str(TINY), torch.float32), pairs)


def gsm8k(count, rng, width, layers, vocabulary):
    """Random pairs of GSM8K's length on a random model."""
    pairs = []
    for _ in range(count):
        lengths = rng.integers([60, 120, 120], [141, 281, 281])
        ids = [rng.integers(10, vocabulary, length) for length in lengths]
        pairs.append(states_of(ids[0], ids[1:], rng))
    return Work("GSM8K's length", build(vocabulary, width, layers, CPU), pairs)


# --- the ways ---------------------------------------------------------------------------------------------


def response_score(model, states):
    """(S,) in a pass of its own."""
    return score.row_scores(model, [(states, (index,)) for index in range(len(states.inputs))], CPU)


@torch.no_grad()
def unpacked_scores(work):
    return [response_score(work.model, states) for pair in work.pairs for states in pair]


def unpacked_gradient(work):
    for pair in work.pairs:
        loss([response_score(work.model, states).sum() for states in pair]).backward()


@torch.no_grad()
def packed_scores(work, tokens):
    return score.state_scores(work.model, [states for pair in work.pairs for states in pair], tokens, Ranks(0, 1, CPU))


def packed_gradient(work, tokens):
    add_gradient(work.model, [Piece(pair, loss) for pair in work.pairs], tokens)


def ways(work, tokens):
    """{name: (function of the scores, function that adds the gradient)}."""
    found = {"unpacked": (functools.partial(unpacked_scores, work), functools.partial(unpacked_gradient, work))}
    for most in tokens:
        functions = (packed_scores, packed_gradient)
        found[f"{most}"] = tuple(functools.partial(function, work, most) for function in functions)
    return found


def gradient_of(work, add):
    """The gradient (parameters,) that `add` makes."""
    work.model.zero_grad()
    add()
    return torch.cat([parameter.grad.flatten() for parameter in work.model.parameters()])


# --- the table --------------------------------------------------------------------------------------------


def seconds(function):
    """Of the processor, which other work on the machine does not lengthen."""
    began = time.process_time()
    function()
    return time.process_time() - began


def measure(work, args):
    """[row] of a Work, a way each."""
    found = ways(work, args.tokens)
    scores = {name: torch.cat(score_all()) for name, (score_all, _) in found.items()}
    gradients = {name: gradient_of(work, add) for name, (_, add) in found.items()}
    cases = [(name, which) for name in found for which in (0, 1)]
    taken = by_turns(cases, lambda case: seconds(found[case[0]][case[1]]), args.turns, 0)
    rows = []
    for name in found:
        rates = [len(work.pairs) / taken[name, which] for which in (0, 1)]
        off = gradients[name] - gradients["unpacked"]
        rows.append(
            {
                "pairs": work.name,
                "way": name,
                "scored_per_second": rates[0],
                "score_speedup": taken["unpacked", 0] / taken[name, 0],
                "pairs_per_second": rates[1],
                "speedup": taken["unpacked", 1] / taken[name, 1],
                "scores_apart": float((scores[name] - scores["unpacked"]).abs().max()),
                "gradients_apart": float(off.norm() / gradients["unpacked"].norm()),
            }
        )
    return rows


def show(row):
    scored = f"{row['scored_per_second']:9.2f}{row['score_speedup']:6.2f}{row['scores_apart']:10.1e}"
    trained = f"{row['pairs_per_second']:10.2f}{row['speedup']:6.2f}{row['gradients_apart']:10.1e}"
    print(f"{row['pairs']:<16}{row['way']:>9} | {scored} | {trained}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192], help="tokens of a packed pass")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few pairs, a tiny random model")
    parser.add_argument("--json", help="write the table there")
    args = parser.parse_args(argv)
    rng, pairs = np.random.default_rng(0), 4 if args.quick else 8
    shape = (32, 1, 512) if args.quick else (256, 4, 8192)
    print(
        f"{'pairs':<16}{'way':>9} | {'scored/s':>9}{'x':>6}{'apart':>10} | {'trained/s':>10}{'x':>6}{'apart':>10}   "
        f"({pairs} and {pairs // 2} pairs, {1 + R * (T - 1)} states a response, {torch.get_num_threads()} thread(s))"
    )
    table = []
    for work in (embedded(pairs, rng), gsm8k(pairs // 2, rng, *shape)):
        for row in measure(work, args):
            table.append(row)
            show(row)
    if args.json:
        about = {"pairs": pairs, "threads": torch.get_num_threads(), "torch": torch.__version__}
        files.write_json(args.json, {"table": table} | about)


if __name__ == "__main__":
    main()
