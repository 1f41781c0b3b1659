"""A layer of experts: against a loop over its tokens, and against a dense layer of the same active size.

    python bench/experts.py [--model llada2_mini] [--tokens 512] [--device cpu] [--json FILE]

The layer has a model's numbers of experts and their widths divided by --divide (CPU: 4). The dense layer is as wide as
all experts of one token together, so it multiplies as much. The three are timed in turn, round after round, and the
medians are compared: the figures of one run are comparable, those of two runs are not. The loop goes token after token,
expert after expert; its time is measured on --loop_tokens tokens and scaled to all.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import files
from models.experts import Experts
from models.moe import MLP

SHAPES = {  # width, width of an expert, experts, experts of a token
    "llada2_mini": (2048, 512, 256, 8),
    "lladamoe": (2048, 1024, 64, 8),
}


def by_token(layer, x, chosen, weights):
    """The plain loop: x (n, D), chosen and weights (n, K) -> (n, D)."""
    gate, up, down = (each.weight for each in (layer.gate_proj, layer.up_proj, layer.down_proj))
    rows = []
    for row, its_experts, its_weights in zip(x, chosen.tolist(), weights):
        parts = [
            weight.to(x.dtype) * F.linear(F.silu(F.linear(row, gate[e])) * F.linear(row, up[e]), down[e])
            for e, weight in zip(its_experts, its_weights)
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def make(args):
    """(layer, dense layer of the same active size, x, chosen, weights)."""
    width, hidden, count, each = SHAPES[args.model]
    width, hidden = width // args.divide, hidden // args.divide
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.manual_seed(0)
    layer, dense = Experts(count, width, hidden), MLP(width, each * hidden)
    for parameter in (*layer.parameters(), *dense.parameters()):
        torch.nn.init.normal_(parameter, 0, width**-0.5)
    x = torch.randn(args.tokens, width)
    weights, chosen = torch.randn(args.tokens, count).softmax(-1).topk(each)
    place = {"device": args.device, "dtype": dtype}
    return layer.to(**place), dense.to(**place), x.to(**place), chosen.to(args.device), weights.to(args.device)


def passes(function, layer, x):
    """Forward and backward passes of function(x): the result and the gradients of x and of the layer's weights."""
    x = x.detach().requires_grad_()
    result = function(x)
    return [result.detach(), *torch.autograd.grad(result.float().square().sum(), [x, *layer.parameters()])]


def seconds(function, layer, x):
    """Seconds of passes(); on a card until it has finished."""
    start = time.perf_counter()
    passes(function, layer, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(args):
    """{what: figure} of one run."""
    layer, dense, x, chosen, weights = make(args)
    few = slice(0, args.loop_tokens)

    def grouped(x):
        return layer(x, chosen[: len(x)], weights[: len(x)])

    def loop(x):
        return by_token(layer, x, chosen[: len(x)], weights[: len(x)])

    pairs = zip(passes(grouped, layer, x[few]), passes(loop, layer, x[few]))
    worst = max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)
    cases = {"grouped": (grouped, layer, x), "dense": (dense, dense, x), "loop": (loop, layer, x[few])}
    times = {name: [] for name in cases}
    for _ in range(args.rounds + 1):  # the first warms up
        for name, case in cases.items():
            times[name].append(seconds(*case))
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    return {
        "largest difference": worst,
        "grouped, ms": 1e3 * medians["grouped"],
        "loop / grouped": medians["loop"] * args.tokens / args.loop_tokens / medians["grouped"],
        "grouped / dense": medians["grouped"] / medians["dense"],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llada2_mini")
    parser.add_argument("--divide", type=int, default=4, help="what the widths are divided by")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--loop_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="write the figures there")
    args = parser.parse_args(argv)
    figures = measure(args)
    for name, value in figures.items():
        print(f"{name:20} {value:.3g}", flush=True)
    if args.json:
        files.write_json(args.json, figures)
    return 0


if __name__ == "__main__":
    main()
