"""Peak memory of one pair's exact gradient against the number of states: constant with states_per_forward fixed.

    python bench/memory.py [--states_per_forward 2] [--length 512] [--device cpu]

Each row is a process of its own: peak memory over what the process held before the gradient (resident set on a CPU,
allocated on a GPU), with states_per_forward as given and with all states in one graph.
"""
import argparse
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import diffusion  # noqa: E402
import score  # noqa: E402
from llada import LLaDAConfig, LLaDAModelLM  # noqa: E402


def peak(device):
    """MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def worker(steps, args):
    """Print the growth of the peak, in MiB, of one pair's gradient with `steps` denoising steps."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = LLaDAModelLM(LLaDAConfig(d_model=256, n_layers=4, n_heads=8, mlp_hidden_size=768, vocab_size=8192)).to(device).train()
    rng = np.random.default_rng(0)
    prompt, n = rng.integers(10, 8000, args.length // 4), args.length - args.length // 4

    def pair(T):
        for _ in range(2):
            masked = diffusion.state_masks(n, "stepwise", T, 1, rng)
            yield score.response_states(prompt, rng.integers(10, 8000, n), masked, diffusion.state_weights(masked, "stepwise", T, 1), 3)
    gradient = lambda T, per: score.score_and_backward(  # noqa: E731
        model, list(pair(T)), lambda s: -torch.nn.functional.logsigmoid(s[0] - s[1]), per, device, lambda loss: loss.backward())
    gradient(1, 1)  # gradients and buffers exist from here on
    before = peak(device)
    gradient(steps, args.states_per_forward or steps)
    print(peak(device) - before)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="numbers of states to try")
    parser.add_argument("--states_per_forward", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args.worker, args)
    print(f"{'states':>8}{f'{args.states_per_forward} a forward':>16}{'one graph':>16}   (peak MiB, {args.length} tokens, {args.device})")
    for states in args.states:
        cells = []
        for per in (args.states_per_forward, 0):
            command = [sys.executable, __file__, "--worker", str(states), "--states_per_forward", str(per),
                       "--length", str(args.length), "--device", args.device]
            cells.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
        print(f"{states:8d}{cells[0]:16.0f}{cells[1]:16.0f}", flush=True)


if __name__ == "__main__":
    main()
