"""A training step's gradient against the guide's loop: pairs a second and peak memory, the same gradient.

    python bench/step.py [--json FILE] [--device cuda] [--quick]

The guide's loop, its pseudocode to the letter but for teacher forcing: a deep-copied reference, T forwards one after the other
with their graph, logits of the whole row, a batch of one. Ours: reference scores from disk, states in batches, the head where a
token is scored. Both take stepwise, T steps of one trajectory, of the same pair and the same masks. calibrated: ours again, with
the design and k of CALIBRATED, whose gradient has less error than 20 steps of one trajectory (bench/estimators.py has both).

Each row's two or three workers run by turns, each in a process of its own: seconds are medians, memory is the peak above the
process with its model. limit: the arithmetic that the gradient needs (forward, and twice that backward) at the rate of a large
matrix product, measured in the same process; of it: how near the step comes.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import files

# noqa: E402
import score  # noqa: E402
from models.llada import LLaDAConfig, LLaDAModelLM  # noqa: E402
from scoring import noise
from scoring.losses import preference_loss  # noqa: E402
from scoring.states import response_states  # noqa: E402

MASK, BETA = 3, 0.1
CALIBRATED = ("spread", 2, 3, 0)  # estimator, T, R, k
PER_FORWARD = 4  # states a forward pass, of ours
# T, prompt, response, V, width, layers; the first is the headline
ROWS = [
    (20, 32, 96, 126464, 64, 2),
    (4, 32, 96, 126464, 64, 2),
    (20, 32, 96, 32000, 256, 4),
    (20, 64, 192, 8192, 256, 4),
]
QUICK = [(12, 8, 24, 32000, 32, 1)]


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

    def guide(self, reference):
        scores = [
            guide_score(self.model, self.prompt, side, reveal[0], self.T, self.device)
            for side, reveal in zip(self.sides, self.reveal)
        ]
        with torch.no_grad():
            refs = [
                guide_score(reference, self.prompt, side, reveal[0], self.T, self.device)
                for side, reveal in zip(self.sides, self.reveal)
            ]
        loss = preference_loss((scores[0] - refs[0]) - (scores[1] - refs[1]), BETA)
        loss.backward()

    def states(self, estimator, T, R, k):
        """The States of both responses."""
        rng, made = np.random.default_rng(1), []
        for side, reveal in zip(self.sides, self.reveal):
            masked = noise.trajectory_masks(reveal, T) if R == 1 else noise.state_masks(len(side), estimator, T, R, rng)
            weight = noise.state_weights(masked, estimator, T, R)
            states = response_states(self.prompt, side, masked, weight, MASK)
            made.append(states.carrying(noise.gradient_states(masked, weight, k, rng), k) if k else states)
        return made

    def ours(self, states, refs, states_per_forward):
        """refs: the scores that the reference job left on disk."""
        of = lambda scores: preference_loss((scores[0] - refs[0]) - (scores[1] - refs[1]), BETA)  # noqa: E731
        score.score_and_backward(self.model, states, of, states_per_forward, self.device, lambda loss: loss.backward())


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
    """Floating-point operations that the gradient needs: forward, and twice that backward, of the states that carry it."""
    config, total = model.config, 0
    block = 4 * config.d_model**2 + 3 * config.d_model * config.mlp_width
    for part in states:
        for which, factor in ((part, 1), (part.graph or part, 2 if part.graph is None else 3)):
            (S, L), scored = which.inputs.shape, np.count_nonzero(which.weight)
            total += factor * (
                2 * S * L * config.n_layers * (block + 2 * L * config.d_model)
                + 2 * scored * config.d_model * config.rows
            )
    return total


def peak(device):
    """Bytes."""
    return (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    )


def worker(kind, row, device, repeats):
    """Print what one way takes, as JSON."""
    T, P, n, V, width, layers = row
    model = build(V, width, layers, device)
    rate = matrix_rate(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # an accumulating step's gradients are part of the model's own
    pair, reference = Pair(model, T, P, n, V, device), None
    design = CALIBRATED if kind == "calibrated" else ("stepwise", T, 1, 0)
    if kind == "guide":
        reference = copy.deepcopy(model).requires_grad_(False)
        run = lambda: pair.guide(reference)  # noqa: E731
    else:
        states = pair.states(*design)
        with torch.no_grad():
            refs = [float(score.state_scores(model, part, 4, device).sum()) for part in states]
        run = lambda: pair.ours(states, refs, PER_FORWARD)  # noqa: E731
    wait(device)
    before = peak(device) - (sum(p.numel() * p.element_size() for p in reference.parameters()) if reference else 0)
    seconds = []
    for repeat in range(repeats + 1):  # the first warms up
        for parameter in model.parameters():
            parameter.grad.zero_()
        began = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - began)
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()
    probe = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)).double()  # fingerprints of the gradient
    marks = [float(gradient.norm())] + [
        float((gradient * torch.cos(torch.arange(len(gradient), device=device) * value)).sum())
        for value in probe.flatten().tolist()
    ]
    need = flops(model, states) if kind != "guide" else None
    print(
        json.dumps(
            {
                "seconds": statistics.median(seconds[1:]),
                "mib": (peak(device) - before) / 2**20,
                "marks": marks,
                "limit": need and need / rate,
                "gflops": rate / 1e9,
            }
        )
    )


def measure(row, args):
    """{kind: what its workers said}, by turns."""
    said = {kind: [] for kind in ("guide", "ours", "calibrated")}
    for turn in range(args.turns):
        for kind, results in said.items():
            command = [sys.executable, __file__, "--worker", kind, "--row", *map(str, row), "--device", args.device]
            results.append(
                json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            )
    marks = np.array([said[kind][0]["marks"] for kind in ("guide", "ours")])
    assert np.abs(marks[0] - marks[1]).max() < 1e-4 * marks[0, 0], f"not the same gradient: {marks}"
    return {
        kind: {
            "seconds": statistics.median(r["seconds"] for r in results),
            "mib": statistics.median(r["mib"] for r in results),
            "limit": results[0]["limit"] and statistics.median(r["limit"] for r in results),
        }
        for kind, results in said.items()
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the table there")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=3, help="processes of each kind")
    parser.add_argument("--quick", action="store_true", help="one small row")
    parser.add_argument("--worker", choices=("guide", "ours", "calibrated"), help=argparse.SUPPRESS)
    parser.add_argument("--row", type=int, nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args.worker, args.row, torch.device(args.device), 2)
    estimator, T, R, k = CALIBRATED
    print(
        f"ours: the same gradient, {PER_FORWARD} states a forward; calibrated: {estimator}, T = {T}, R = {R}, k = {k or 'all'}; "
        f"{args.device}, {torch.get_num_threads()} thread(s)\n"
        f"{'T':>3}{'prompt':>7}{'resp.':>6}{'V':>8}{'width':>6}{'layers':>7} | {'pairs/s: guide':>14}{'ours':>7}{'x':>6}{'calibr.':>9}{'x':>6}"
        f" | {'MiB: guide':>10}{'ours':>6}{'share':>7}{'calibr.':>8} | {'limit/step: ours':>16}{'calibr.':>8}"
    )
    table = []
    for row in QUICK if args.quick else ROWS:
        got = measure(row, args)
        guide, ours, fewer = got["guide"], got["ours"], got["calibrated"]
        table.append(
            {
                "row": row,
                **got,
                "speedup": guide["seconds"] / ours["seconds"],
                "memory_ratio": ours["mib"] / guide["mib"],
                "calibrated_speedup": guide["seconds"] / fewer["seconds"],
            }
        )
        line = table[-1]
        print(
            "{:3d}{:7d}{:6d}{:8d}{:6d}{:7d} | ".format(*row)
            + f"{1 / guide['seconds']:14.2f}{1 / ours['seconds']:7.2f}{line['speedup']:6.1f}{1 / fewer['seconds']:9.2f}"
            f"{line['calibrated_speedup']:6.1f} | {guide['mib']:10.0f}{ours['mib']:6.0f}{line['memory_ratio']:7.3f}{fewer['mib']:8.0f} | "
            f"{ours['limit'] / ours['seconds']:16.2f}{fewer['limit'] / fewer['seconds']:8.2f}",
            flush=True,
        )
    if args.json:
        keys = ("speedup", "memory_ratio", "calibrated_speedup")
        files.write_json(
            args.json,
            {
                "headline": {key: table[0][key] for key in keys},
                "table": table,
                "device": args.device,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        )


if __name__ == "__main__":
    main()
