"""What the work costs as it grows: a gradient against states and length, the reference job against pairs and ranks.

    python bench/scaling.py [--json FILE] [--turns 3] [--device cpu] [--quick]

states     seconds a state of one pair's gradient (spread, one trajectory of T steps): constant where cost is linear
length     the same gradient against prompt + response: seconds a token grow with attention, so beside them the seconds
           for each GFLOP that the arithmetic needs
pairs      score.py as a process on the first pairs of examples/prefs.jsonl, 1 rank and 2: seconds of each further pair,
           which leave out the start; speed-up: of 2 ranks over 1, with a thread each
Values are taken in turns and are medians. spread: the largest over the smallest of a column; 1 is linear.
T denoising steps, V vocabulary.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from step import BETA, MASK, add_gradient, build, flops, wait
from torch.nn.functional import logsigmoid

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
from scoring import noise
from scoring.states import response_states
from scoring.window import Piece


class Sizes(NamedTuple):
    """What is tried, on a model of which shape."""

    states: tuple
    lengths: tuple
    pairs: tuple
    V: int
    width: int
    layers: int


FULL = Sizes((4, 8, 16, 32), (64, 128, 256, 512), (100, 250, 400), 8192, 256, 4)
QUICK = Sizes((2, 4), (8, 16), (2, 4), 512, 32, 1)
PER_FORWARD = 4  # states of a forward pass


def pair_of(length, T, V):
    """The States of a pair: a quarter of `length` is prompt."""
    rng = np.random.default_rng(0)
    prompt, made = rng.integers(10, V, length // 4), []
    for _ in range(2):
        response = rng.integers(10, V, length - len(prompt))
        masked = noise.state_masks(len(response), "spread", T, 1, rng)
        made.append(response_states(prompt, response, masked, noise.state_weights(masked, "spread", T, 1), MASK))
    return made


def gradient_seconds(model, states, device):
    began = time.perf_counter()
    add_gradient(model, [Piece(states, loss)], PER_FORWARD * states[0].inputs.shape[1])
    wait(device)
    return time.perf_counter() - began


def loss(scores):
    return -logsigmoid(BETA * (scores[0] - scores[1]))


def by_turns(cases, run, turns, warm):
    """{case: median of run(case)}, every case once a turn, after `warm` turns that do not count."""
    seconds = {case: [] for case in cases}
    for _ in range(warm + turns):
        for case in cases:
            seconds[case].append(run(case))
    return {case: statistics.median(values[warm:]) for case, values in seconds.items()}


def reference_seconds(folder, pairs, ranks):
    """Seconds of score.py on `pairs` pairs; what an earlier turn wrote is removed."""
    data = folder / f"{pairs}"
    for old in data.glob("ref-*/*"):
        old.unlink()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    options = ["--data", data, "--use_mixed_precision", "no", "--tokens_per_forward", "1024"]
    began = time.perf_counter()
    subprocess.run([sys.executable, *launcher, ROOT / "score.py", *options], check=True, capture_output=True)
    return time.perf_counter() - began


def pack(folder, pairs):
    """Pack the first pairs of examples/prefs.jsonl into folder/PAIRS."""
    source = folder / f"{pairs}.jsonl"
    lines = (ROOT / "examples" / "prefs.jsonl").read_text(encoding="utf-8").splitlines(True)
    source.write_text("".join(lines[:pairs]), encoding="utf-8")
    options = ["--in", source, "--out", folder / f"{pairs}", "--model_name_or_path", ROOT / "examples" / "tiny"]
    subprocess.run([sys.executable, ROOT / "data_prep.py", *options], check=True, capture_output=True)


def spread(values):
    return max(values) / min(values)


def against_states(args, sizes, model, device):
    """[row] of one pair's gradient against the number of states."""
    length = sizes.lengths[1]
    made = {T: pair_of(length, T, sizes.V) for T in sizes.states}

    def run(T):
        return gradient_seconds(model, made[T], device)

    rows = []
    print(f"{'states':>8}{'s a pair':>12}{'s a state':>12}   ({length} tokens, {PER_FORWARD} rows a forward)")
    for T, seconds in by_turns(sizes.states, run, args.turns, 1).items():
        rows.append({"states": T, "seconds": seconds, "per_state": seconds / (2 * T)})
        print(f"{T:8d}{seconds:12.3f}{rows[-1]['per_state']:12.4f}", flush=True)
    print(f"spread: {spread([row['per_state'] for row in rows]):.2f}\n")
    return rows


def against_lengths(args, sizes, model, device):
    """[row] of one pair's gradient against prompt + response."""
    made = {length: pair_of(length, 4, sizes.V) for length in sizes.lengths}

    def run(length):
        return gradient_seconds(model, made[length], device)

    rows = []
    print(f"{'tokens':>8}{'s a pair':>12}{'ms a token':>12}{'s a GFLOP':>12}   (4 states)")
    for length, seconds in by_turns(sizes.lengths, run, args.turns, 1).items():
        per_token, per_gflop = seconds / (8 * length), seconds / flops(model, made[length]) * 1e9
        rows.append({"tokens": length, "seconds": seconds, "per_token": per_token, "per_gflop": per_gflop})
        print(f"{length:8d}{seconds:12.3f}{per_token * 1e3:12.3f}{per_gflop:12.4f}", flush=True)
    per_token = spread([row["per_token"] for row in rows])
    per_gflop = spread([row["per_gflop"] for row in rows])
    print(f"spread: of a token {per_token:.2f}, of a GFLOP {per_gflop:.2f}\n")
    return rows


def against_pairs(args, sizes):
    """([row] of the reference job, speed-up of 2 ranks) against pairs and ranks."""
    pairs, cases = sizes.pairs, [(count, ranks) for ranks in (1, 2) for count in sizes.pairs]
    with tempfile.TemporaryDirectory() as name:
        for count in pairs:
            pack(Path(name), count)
        seconds = by_turns(cases, lambda case: reference_seconds(Path(name), *case), args.turns, 0)
    each_more, whole = {1: [], 2: []}, {}
    print(f"{'ranks':>8}{'pairs':>8}{'s in all':>12}{'s each more':>13}")
    for ranks in (1, 2):
        for before, count in zip((None, *pairs), pairs):
            more = float("nan")
            if before:
                more = (seconds[count, ranks] - seconds[before, ranks]) / (count - before)
                each_more[ranks].append(more)
            print(f"{ranks:8d}{count:8d}{seconds[count, ranks]:12.1f}{more:13.4f}", flush=True)
        whole[ranks] = (seconds[pairs[-1], ranks] - seconds[pairs[0], ranks]) / (pairs[-1] - pairs[0])
    speedup = whole[1] / whole[2]
    print(
        f"spread: 1 rank {spread(each_more[1]):.2f}, 2 ranks {spread(each_more[2]):.2f}; "
        f"speed-up of 2 ranks {speedup:.2f}"
    )
    return [{"ranks": ranks, "pairs": count, "seconds": seconds[count, ranks]} for count, ranks in cases], speedup


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the tables there")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args(argv)
    sizes, device = QUICK if args.quick else FULL, torch.device(args.device)
    model = build(sizes.V, sizes.width, sizes.layers, device)
    states, lengths = against_states(args, sizes, model, device), against_lengths(args, sizes, model, device)
    pairs, speedup = against_pairs(args, sizes)
    if args.json:
        result = {
            "states": states,
            "lengths": lengths,
            "pairs": pairs,
            "speedup_of_2_ranks": speedup,
            "device": args.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        files.write_json(args.json, result)


if __name__ == "__main__":
    main()
