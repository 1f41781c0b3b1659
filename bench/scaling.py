"""What the work costs as it grows: a gradient against states and length, the reference job against pairs and ranks.

    python bench/scaling.py [--json FILE] [--turns 3] [--device cpu] [--quick]

states     seconds a state of one pair's gradient (spread, one trajectory of T steps): constant where cost is linear
length     the same gradient against prompt + response: seconds a token grow with attention, so beside them the seconds for each
           GFLOP that the arithmetic needs
pairs      score.py as a process on the first pairs of examples/prefs.jsonl, 1 rank and 2: seconds of each further pair, which
           leave out the start; speed-up: of 2 ranks over 1, with a thread each
Values are taken by turns and are medians. spread: the largest over the smallest of a column; 1 is linear.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from step import BETA, MASK, build, flops, wait

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files

# noqa: E402
import score  # noqa: E402
from scoring import noise
from scoring.losses import preference_loss  # noqa: E402
from scoring.states import response_states  # noqa: E402

STATES, LENGTHS, PAIRS = (4, 8, 16, 32), (64, 128, 256, 512), (100, 250, 400)
SHAPE = (8192, 256, 4)  # V, width, layers
QUICK = ((2, 4), (8, 16), (2, 4)), (512, 32, 1)
PER_FORWARD = 4


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
    score.score_and_backward(
        model, states, lambda s: preference_loss(s[0] - s[1], BETA), PER_FORWARD, device, lambda loss: loss.backward()
    )
    wait(device)
    return time.perf_counter() - began


def by_turns(cases, run, turns, warm):
    """{case: median of run(case)}, every case once a turn, after `warm` turns that do not count."""
    seconds = {case: [] for case in cases}
    for turn in range(warm + turns):
        for case in cases:
            seconds[case].append(run(case))
    return {case: statistics.median(values[warm:]) for case, values in seconds.items()}


def reference_seconds(folder, pairs, ranks):
    """Seconds of score.py on `pairs` pairs; what an earlier turn wrote is removed."""
    data = folder / f"{pairs}"
    for old in data.glob("ref-*/*"):
        old.unlink()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    began = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            *launcher,
            ROOT / "score.py",
            "--data",
            data,
            "--use_mixed_precision",
            "no",
            "--states_per_forward",
            "16",
        ],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


def pack(folder, pairs):
    source = folder / f"{pairs}.jsonl"
    source.write_text(
        "".join((ROOT / "examples" / "prefs.jsonl").read_text(encoding="utf-8").splitlines(True)[:pairs]),
        encoding="utf-8",
    )
    subprocess.run(
        [
            sys.executable,
            ROOT / "data_prep.py",
            "--in",
            source,
            "--out",
            folder / f"{pairs}",
            "--model_name_or_path",
            ROOT / "examples" / "tiny",
        ],
        check=True,
        capture_output=True,
    )


def spread(values):
    return max(values) / min(values)


def gradients(args, table):
    """The tables of states and of lengths."""
    (states, lengths, _), (V, width, layers) = QUICK if args.quick else ((STATES, LENGTHS, PAIRS), SHAPE)
    device = torch.device(args.device)
    model = build(V, width, layers, device)
    made = {T: pair_of(lengths[1], T, V) for T in states}
    seconds = by_turns(states, lambda T: gradient_seconds(model, made[T], device), args.turns, 1)
    print(f"{'states':>8}{'s a pair':>12}{'s a state':>12}   ({lengths[1]} tokens, {PER_FORWARD} states a forward)")
    for T, value in seconds.items():
        print(f"{T:8d}{value:12.3f}{value / (2 * T):12.4f}", flush=True)
    table["states"] = [{"states": T, "seconds": value, "per_state": value / (2 * T)} for T, value in seconds.items()]
    print(f"spread: {spread([row['per_state'] for row in table['states']]):.2f}\n")

    made = {length: pair_of(length, 4, V) for length in lengths}
    seconds = by_turns(lengths, lambda length: gradient_seconds(model, made[length], device), args.turns, 1)
    print(f"{'tokens':>8}{'s a pair':>12}{'ms a token':>12}{'s a GFLOP':>12}   (4 states)")
    for length, value in seconds.items():
        row = {
            "tokens": length,
            "seconds": value,
            "per_token": value / (8 * length),
            "per_gflop": value / flops(model, made[length]) * 1e9,
        }
        table.setdefault("lengths", []).append(row)
        print(f"{length:8d}{value:12.3f}{row['per_token'] * 1e3:12.3f}{row['per_gflop']:12.4f}", flush=True)
    print(
        f"spread: of a token {spread([row['per_token'] for row in table['lengths']]):.2f}, "
        f"of a GFLOP {spread([row['per_gflop'] for row in table['lengths']]):.2f}\n"
    )


def references(args, table):
    """The table of pairs and ranks."""
    pairs = QUICK[0][2] if args.quick else PAIRS
    cases = [(count, ranks) for ranks in (1, 2) for count in pairs]
    with tempfile.TemporaryDirectory() as name:
        for count in pairs:
            pack(Path(name), count)
        seconds = by_turns(cases, lambda case: reference_seconds(Path(name), *case), args.turns, 0)
    each = {}
    print(f"{'ranks':>8}{'pairs':>8}{'s in all':>12}{'s each more':>13}")
    for ranks in (1, 2):
        for before, count in zip((None, *pairs), pairs):
            more = (seconds[count, ranks] - seconds[before, ranks]) / (count - before) if before else None
            each.setdefault(ranks, []).extend([more] if before else [])
            print(
                f"{ranks:8d}{count:8d}{seconds[count, ranks]:12.1f}{more if before else float('nan'):13.4f}", flush=True
            )
    whole = {ranks: (seconds[pairs[-1], ranks] - seconds[pairs[0], ranks]) / (pairs[-1] - pairs[0]) for ranks in (1, 2)}
    table["pairs"] = [{"ranks": ranks, "pairs": count, "seconds": seconds[count, ranks]} for count, ranks in cases]
    table["speedup_of_2_ranks"] = whole[1] / whole[2]
    print(
        f"spread: 1 rank {spread(each[1]):.2f}, 2 ranks {spread(each[2]):.2f}; speed-up of 2 ranks {whole[1] / whole[2]:.2f}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the tables there")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args(argv)
    table = {}
    gradients(args, table)
    references(args, table)
    if args.json:
        files.write_json(
            args.json, table | {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        )


if __name__ == "__main__":
    main()
