"""Peak memory of one pair's exact gradient against the number of states: flat with states_per_forward fixed.

    python bench/memory.py [--states 4 8 16 32 64] [--states_per_forward 2] [--length 512] [--device cpu] [--json FILE]

Each cell is a process of its own: peak memory over what the process held with its model and gradients (resident set on a CPU,
allocated on a GPU), with states_per_forward as given and with all states in one graph. The last line is the largest over the
smallest of the first column.
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import files

# noqa: E402
import score  # noqa: E402
from models.llada import LLaDAConfig, LLaDAModelLM  # noqa: E402
from scoring import noise
from scoring.states import response_states  # noqa: E402

# What is freed goes back at once: else the resident set shows the allocator's habits, which change with every allocation.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak(device):
    """MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def worker(states, args):
    """Print the growth of the peak, in MiB, of one pair's gradient with so many states of one trajectory."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = (
        LLaDAModelLM(LLaDAConfig(d_model=256, n_layers=4, n_heads=8, mlp_hidden_size=768, vocab_size=8192))
        .to(device)
        .train()
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rng, made = np.random.default_rng(0), []
    prompt, n = rng.integers(10, 8000, args.length // 4), args.length - args.length // 4
    for _ in range(2):
        masked = noise.state_masks(n, "spread", states, 1, rng)
        weight = noise.state_weights(masked, "spread", states, 1)
        made.append(response_states(prompt, rng.integers(10, 8000, n), masked, weight, 3))
    before = peak(device)
    score.score_and_backward(
        model,
        made,
        lambda s: -torch.nn.functional.logsigmoid(s[0] - s[1]),
        args.states_per_forward or states,
        device,
        lambda loss: loss.backward(),
    )
    print(peak(device) - before)


def measure(states, per, args):
    """MiB of one cell."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        str(states),
        "--states_per_forward",
        str(per),
        "--length",
        str(args.length),
        "--device",
        args.device,
    ]
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | MALLOC).stdout.split()[-1]
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="numbers of states to try")
    parser.add_argument("--states_per_forward", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the table there")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args.worker, args)
    print(
        f"{'states':>8}{f'{args.states_per_forward} a forward':>16}{'one graph':>16}   (peak MiB, {args.length} tokens, {args.device})"
    )
    table = []
    for states in args.states:
        table.append(
            {
                "states": states,
                "segmented_mib": measure(states, args.states_per_forward, args),
                "joint_mib": measure(states, 0, args),
            }
        )
        print(f"{states:8d}{table[-1]['segmented_mib']:16.0f}{table[-1]['joint_mib']:16.0f}", flush=True)
    flat = [row["segmented_mib"] for row in table]
    print(f"largest / smallest at {args.states_per_forward} a forward: {max(flat) / min(flat):.3f}")
    if args.json:
        files.write_json(
            args.json,
            {
                "table": table,
                "largest_over_smallest": max(flat) / min(flat),
                "length": args.length,
                "states_per_forward": args.states_per_forward,
                "device": args.device,
            },
        )


if __name__ == "__main__":
    main()
