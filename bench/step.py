"""A training step's gradient against a plain loop: pairs a second and peak memory, the same gradient.

    python bench/step.py [--json FILE] [--device cuda] [--quick]

guide       its pseudocode to the letter but for teacher forcing: a deep-copied reference, T forwards one after
            the other with their graph, logits of the whole row, a batch of one
ours        reference scores from disk, rows of both responses in one pass, the head where a token is scored; the same
            pair and masks as the plain loop's, both stepwise with T steps of one trajectory
calibrated  ours again, with the default estimator, whose gradient has less error than 20 steps of one trajectory
            (bench/estimators.py has both)
limit       seconds of the arithmetic that the gradient needs (forward, and twice that backward) at the rate of a large
            matrix product, measured in the same process

A row's workers run in turns, each in a process of its own: seconds are medians, memory is the peak above the process
with its model. n response tokens, T denoising steps, R trajectories, S states, L length, V vocabulary.
"""

import argparse
import copy
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).parent.parent))
import files
import score
from models.llada import LLaDAConfig, LLaDAModelLM
from scoring import noise
from scoring.states import response_states
from scoring.window import Piece
from training.engine import Ranks

MASK, BETA = 3, 0.1
KINDS = ("guide", "ours", "calibrated")
PER_FORWARD = 8  # rows of a forward pass, of ours


class Design(NamedTuple):
    estimator: str
    T: int
    R: int
    k: int  # states in the gradient; 0: all


class Row(NamedTuple):
    T: int
    prompt: int  # tokens
    response: int
    V: int
    width: int
    layers: int


CALIBRATED = Design(*noise.default_design(), k=0)
ROWS = [  # the first is the headline
    Row(20, 32, 96, 126464, 64, 2),
    Row(4, 32, 96, 126464, 64, 2),
    Row(20, 32, 96, 32000, 256, 4),
    Row(20, 64, 192, 8192, 256, 4),
]
QUICK = [Row(12, 8, 24, 32000, 32, 1)]


def build(V, width, layers, device):
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=width, n_layers=layers, n_heads=4, mlp_hidden_size=3 * width, vocab_size=V, mask_token_id=MASK
    )
    return LLaDAModelLM(config).to(device).train()


def guide_score(model, prompt, response, reveal_step, T, device):
    """sum_s sum_{i revealed at s} log p(y_i | state before s, x), one state after the other; reveal_step (n,)."""
    total, P = 0.0, len(prompt)
    targets = torch.from_numpy(response).to(device)
    for s in range(T):
        hidden = torch.from_numpy(reveal_step >= s).to(device)
        state = torch.cat((torch.from_numpy(prompt).to(device), targets.masked_fill(hidden, MASK)))
        logps = model(input_ids=state[None]).logits[0].float().log_softmax(-1)  # (L, V)
        revealed = torch.from_numpy(np.flatnonzero(reveal_step == s)).to(device)
        total = total + logps[P + revealed, targets[revealed]].sum()
    return total


class Pair:
    """One pair, its masks, and both ways to its gradient."""

    def __init__(self, model, T, P, n, V, device):
        rng = np.random.default_rng(0)
        self.model, self.T, self.device = model, T, device
        self.prompt, *self.sides = (rng.integers(10, V, size) for size in (P, n, n))
        self.reveal = [noise.trajectories(n, T, 1, rng) for _ in range(2)]

    def guide_scores(self, model):
        """The plain loop's scores of chosen and rejected."""
        sides = zip(self.sides, self.reveal)
        return [guide_score(model, self.prompt, side, reveal[0], self.T, self.device) for side, reveal in sides]

    def guide(self, reference):
        scores = self.guide_scores(self.model)
        with torch.no_grad():
            refs = self.guide_scores(reference)
        loss_of(scores, refs).backward()

    def states(self, estimator, T, R, k):
        """The States of both responses by a Design."""
        rng, made = np.random.default_rng(1), []
        for side, reveal in zip(self.sides, self.reveal):
            masked = noise.trajectory_masks(reveal, T) if R == 1 else noise.state_masks(len(side), estimator, T, R, rng)
            weight = noise.state_weights(masked, estimator, T, R)
            states = response_states(self.prompt, side, masked, weight, MASK)
            made.append(states.carrying(noise.gradient_states(masked, weight, k, rng)) if k else states)
        return made

    def ours(self, states, refs):
        """refs: the scores that the reference job left on disk."""

        def loss(scores):
            return loss_of(scores, refs)

        add_gradient(self.model, [Piece(states, loss)], self.tokens)

    def scores(self, states):
        """The scores that a reference job would write."""
        ranks = Ranks(0, 1, self.device)
        return [float(each.sum()) for each in score.state_scores(self.model, states, self.tokens, ranks)]

    @property
    def tokens(self):
        """tokens_per_forward: of PER_FORWARD rows."""
        return PER_FORWARD * (len(self.prompt) + len(self.sides[0]))


def add_gradient(model, pieces, tokens_per_forward):
    """Add the gradient of the Pieces' losses to the parameters' grad."""
    ranks = Ranks(0, 1, next(model.parameters()).device)

    def backward(loss, is_last):
        loss.backward()

    return score.score_and_backward(model, pieces, tokens_per_forward, ranks, backward)


def loss_of(scores, refs):
    """DPO's loss of the scores of chosen and rejected, and those of the reference."""
    return -logsigmoid(BETA * ((scores[0] - refs[0]) - (scores[1] - refs[1])))


def matrix_rate(device, size=2048):
    """FLOP/s of a float32 product of square matrices, the best of five."""
    a, best = torch.randn(size, size, device=device), 0
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops(model, states):
    """Floating-point operations of the gradient: forward, and twice that backward, of the states that carry it."""
    total = 0
    for part in states:
        total += forward_flops(model.config, part)
        if part.graph is None:  # the forward above is the graph's
            total += 2 * forward_flops(model.config, part)
        else:
            total += 3 * forward_flops(model.config, part.graph)
    return total


def forward_flops(config, states):
    """Floating-point operations of one forward of these states: blocks, and the head where a token is scored."""
    (S, L), scored = states.inputs.shape, np.count_nonzero(states.weight)
    block = 4 * config.d_model**2 + 3 * config.d_model * config.mlp_width + 2 * L * config.d_model  # a token, a layer
    return 2 * S * L * config.n_layers * block + 2 * scored * config.d_model * config.rows


def peak(device):
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def bytes_of(model):
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def worker(kind, row, device, repeats):
    """Print what one way takes, as JSON."""
    # 1. The model, its gradients, which are part of an accumulating step's own memory, and the pair.
    model = build(row.V, row.width, row.layers, device)
    rate = matrix_rate(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pair = Pair(model, row.T, row.prompt, row.response, row.V, device)

    # 2. The way to the gradient, and the process's memory before it. The plain loop's reference counts as its own.
    need = None
    if kind == "guide":
        reference = copy.deepcopy(model).requires_grad_(False)
        run = functools.partial(pair.guide, reference)
    else:
        states = pair.states(*(CALIBRATED if kind == "calibrated" else Design("stepwise", row.T, 1, 0)))
        with torch.no_grad():
            refs = pair.scores(states)
        run = functools.partial(pair.ours, states, refs)
        need = flops(model, states)
    wait(device)
    before = peak(device) - (bytes_of(reference) if kind == "guide" else 0)

    # 3. Its seconds; the first run warms up.
    seconds = []
    for _ in range(repeats + 1):
        for parameter in model.parameters():
            parameter.grad.zero_()
        began = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - began)
    result = {
        "seconds": statistics.median(seconds[1:]),
        "mib": (peak(device) - before) / 2**20,
        "marks": marks_of(model, device),
        "limit": need and need / rate,
        "gflops": rate / 1e9,
    }
    print(json.dumps(result))


def marks_of(model, device):
    """Numbers by which equal gradients are recognised: the norm, and four products with known vectors."""
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()
    frequencies = torch.randn(4, generator=torch.Generator().manual_seed(0)).double().tolist()
    places = torch.arange(len(gradient), device=device)
    products = [float((gradient * torch.cos(places * frequency)).sum()) for frequency in frequencies]
    return [float(gradient.norm()), *products]


def measure(row, args):
    """{kind: medians of what its workers said}, in turns."""
    results = {kind: [] for kind in KINDS}
    for _ in range(args.turns):
        for kind in KINDS:
            command = [sys.executable, __file__, "--worker", kind, "--row", *map(str, row), "--device", args.device]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[kind].append(json.loads(done.stdout.splitlines()[-1]))
    guide_marks, our_marks = (np.array(results[kind][0]["marks"]) for kind in ("guide", "ours"))
    difference = np.abs(guide_marks - our_marks).max()
    assert difference < 1e-4 * guide_marks[0], f"not the same gradient: {guide_marks}, {our_marks}"
    return {kind: medians(each) for kind, each in results.items()}


def medians(results):
    found = {}
    for name in ("seconds", "mib"):
        found[name] = statistics.median(result[name] for result in results)
    has_limit = results[0]["limit"] is not None
    return found | {"limit": statistics.median(result["limit"] for result in results) if has_limit else None}


def line_of(row, got):
    """A line of the table; got: {kind: medians}."""
    guide, ours, calibrated = (got[kind] for kind in KINDS)
    return {
        "row": row,
        **got,
        "speedup": guide["seconds"] / ours["seconds"],
        "memory_ratio": ours["mib"] / guide["mib"],
        "calibrated_speedup": guide["seconds"] / calibrated["seconds"],
    }


def show_head(args):
    estimator, T, R, k = CALIBRATED
    print(
        f"ours: the same gradient, {PER_FORWARD} rows a forward; "
        f"calibrated: {estimator}, T = {T}, R = {R}, k = {k or 'all'}; "
        f"{args.device}, {torch.get_num_threads()} thread(s)\n"
        f"{'T':>3}{'prompt':>7}{'resp.':>6}{'V':>8}{'width':>6}{'layers':>7} | "
        f"{'pairs/s: guide':>14}{'ours':>7}{'x':>6}{'calibr.':>9}{'x':>6} | "
        f"{'MiB: guide':>10}{'ours':>6}{'share':>7}{'calibr.':>8} | {'limit/step: ours':>16}{'calibr.':>8}"
    )


def show(line):
    guide, ours, calibrated = (line[kind] for kind in KINDS)
    print(
        "{:3d}{:7d}{:6d}{:8d}{:6d}{:7d} | ".format(*line["row"])
        + f"{1 / guide['seconds']:14.2f}{1 / ours['seconds']:7.2f}{line['speedup']:6.1f}"
        f"{1 / calibrated['seconds']:9.2f}{line['calibrated_speedup']:6.1f} | "
        f"{guide['mib']:10.0f}{ours['mib']:6.0f}{line['memory_ratio']:7.3f}{calibrated['mib']:8.0f} | "
        f"{ours['limit'] / ours['seconds']:16.2f}{calibrated['limit'] / calibrated['seconds']:8.2f}",
        flush=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the table there")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=3, help="processes of each kind")
    parser.add_argument("--quick", action="store_true", help="one small row")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=int, nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args.worker, Row(*args.row), torch.device(args.device), 2)
    show_head(args)
    table = []
    for row in QUICK if args.quick else ROWS:
        table.append(line_of(row, measure(row, args)))
        show(table[-1])
    if args.json:
        keys = ("speedup", "memory_ratio", "calibrated_speedup")
        result = {
            "headline": {key: table[0][key] for key in keys},
            "table": table,
            "device": args.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        files.write_json(args.json, result)


if __name__ == "__main__":
    main()
