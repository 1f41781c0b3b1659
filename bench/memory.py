"""Peak memory of one pair's exact gradient against the number of states: flat with tokens_per_forward fixed.

    python bench/memory.py [--states 4 8 16 32 64] [--tokens_per_forward 1024] [--length 512] [--json FILE]

Each cell is a process of its own: peak memory over what the process held with its model and gradients (resident set on
a CPU, allocated on a GPU with --device cuda), with tokens_per_forward as given and with all states of both responses in
one graph. The last line is the largest over the smallest of the first column.
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from step import add_gradient

sys.path.insert(0, str(Path(__file__).parent.parent))
import files
from models.llada import LLaDAConfig, LLaDAModelLM
from scoring import noise
from scoring.states import response_states
from scoring.window import Piece

# Freed memory is returned at once. Else the resident set shows the allocator's habits, which change all the time.
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
    config = LLaDAConfig(d_model=256, n_layers=4, n_heads=8, mlp_hidden_size=768, vocab_size=8192)
    model = LLaDAModelLM(config).to(device).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rng, made = np.random.default_rng(0), []
    prompt, n = rng.integers(10, 8000, args.length // 4), args.length - args.length // 4
    for _ in range(2):
        masked = noise.state_masks(n, "spread", states, 1, rng)
        weight = noise.state_weights(masked, "spread", states, 1)
        made.append(response_states(prompt, rng.integers(10, 8000, n), masked, weight, 3))
    before = peak(device)
    add_gradient(model, [Piece(made, loss)], args.tokens_per_forward or 2 * states * args.length)
    print(peak(device) - before)


def loss(scores):
    return -torch.nn.functional.logsigmoid(scores[0] - scores[1])


def measure(states, tokens, args):
    """MiB of one cell."""
    options = {"worker": states, "tokens_per_forward": tokens, "length": args.length, "device": args.device}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | MALLOC)
    return float(done.stdout.split()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="numbers of states to try")
    parser.add_argument("--tokens_per_forward", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the table there")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args.worker, args)
    first = f"{args.tokens_per_forward} a forward"
    print(f"{'states':>8}{first:>16}{'one graph':>16}   (peak MiB, {args.length} tokens, {args.device})")
    table = []
    for states in args.states:
        segmented, joint = measure(states, args.tokens_per_forward, args), measure(states, 0, args)
        table.append({"states": states, "segmented_mib": segmented, "joint_mib": joint})
        print(f"{states:8d}{segmented:16.0f}{joint:16.0f}", flush=True)
    flat = [row["segmented_mib"] for row in table]
    ratio = max(flat) / min(flat)
    print(f"largest / smallest at {first}: {ratio:.3f}")
    if args.json:
        result = {
            "table": table,
            "largest_over_smallest": ratio,
            "length": args.length,
            "tokens_per_forward": args.tokens_per_forward,
            "device": args.device,
        }
        files.write_json(args.json, result)


if __name__ == "__main__":
    main()
