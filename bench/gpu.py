"""Everything that only a CUDA card can show, in one command that fits a card lent for a quarter of an hour.

    python bench/gpu.py --json FILE [--minutes 12] [--vram_gb 16]    a CUDA card, its memory capped
    python bench/gpu.py --device cpu --quick                         tiny shapes: shows that it runs, no more

check    the machine: what `python check.py` says
parity   logits and log-probabilities of small checkpoints on the card against those on the CPU (gpu_checks.py)
steps    two steps of training of every kind on the card against the same on the CPU: losses, norms of gradients
sampling the sampler of a random LLaDA-8B with and without a cache (gpu_sampling.py)
table    the training step of random models at GSM8K's length, prompt 100 and response 200 (gpu_rows.py)

pairs/s, tokens/s   tokens: prompt and response through the model, states times length, of both responses
TFLOP/s             of the arithmetic that is needed: forward, and twice that backward (once through frozen weights);
                    what is computed twice counts once
of ceiling          that, as a share of a large bfloat16 matrix product's rate in the same process
models, demand      weights that ZeRO-3 fetches from the host for a pair, as a multiple of the model; the share of it
                    that it did not fetch ahead
GPU, host GiB       peaks of the process

Each part is a process of its own with a time limit, and FILE is written whenever more is known: a run that is cut off
still tells. What no longer fits --minutes is left out, and named. A capped larger card stands in for a 4080's memory,
never for its speed or its bus.
"""

import argparse
import functools
import glob
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
from cli import exits

ROWS = {  # name: (seconds that it may take, what it is)
    "8B-LoRA": (260, "LLaDA-8B shape, LoRA r 16, ZeRO-3, weights streamed"),
    "8B-QLoRA": (160, "LLaDA-8B shape, QLoRA r 16, ZeRO-0"),
    "1.1B-full": (120, "SMDM-1.1B shape, full training, ZeRO-2, optimizer offloaded"),
    "0.5B-full": (90, "0.5B shape, full training, ZeRO-2, optimizer offloaded"),
}
LIMITS = {"check": 60, "parity": 90, "steps": 200, "sampling": 150}  # seconds
LEAST = 30  # seconds: with less, a part is not begun
TOLERANCE = {"bf16": 0.05, "QLoRA": 0.05, "": 2e-3}  # by what a case's name holds; of a number, or of 0.1 if it is less
NOT_MEASURED = {"8B-full": "needs 96 to 160 GB of host memory (ds_configs/README.md)"}


class Report:
    """What is known so far, in the file."""

    def __init__(self, path, **about):
        self.path, self.found = path, about | {"check": [], "parity": [], "steps": [], "sampling": [], "table": []}
        self.save()

    def save(self):
        if self.path:
            files.write_json(self.path, self.found)

    def add(self, part, value):
        """Append a value to what is known of a part; returns it."""
        self.found[part].append(value)
        self.save()
        return value

    def leave_out(self, name, why):
        self.found["not_measured"][name] = why
        self.save()

    def too_far(self, part):
        """In words, how many comparisons of a part are not within their bounds; None if all are."""
        rows = [row for row in self.found[part] if not row.get("ok", True)]
        return f"{len(rows)} comparison(s) out of bounds" if rows else None


def follow(command, limit, told, device="cpu"):
    """Run a Python command, told(line) for each line that it prints. Returns None, or what went wrong, in words."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    else:
        env = {"PYTORCH_ALLOC_CONF": allocation()} | env
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        )
        cut = threading.Event()

        def end():
            cut.set()
            process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        for line in process.stdout:
            told(line.rstrip("\n"))
        code = process.wait()
        timer.cancel()
        if cut.is_set():
            return f"cut off after {limit:.0f} s"
        errors.seek(0)
        last = (errors.read().strip() or "?").splitlines()[-1]
    return None if code == 0 else f"exit code {code}: {last}"


def allocation():
    """PYTORCH_ALLOC_CONF as launch.sh sets it."""
    exact = ["pinned_max_cached_size_mb:1"] if importlib.metadata.version("torch") >= "2.13" else []
    growing = ["expandable_segments:True"] if glob.glob("/dev/nvidia[0-9]*") else []
    return ",".join(growing + exact)


def as_json(told):
    """A function for follow() that gives told() what lines of JSON hold, and ignores other lines."""

    def read(line):
        if line.startswith("{"):
            told(json.loads(line))

    return read


# --- the parts --------------------------------------------------------------------------------------------


def check(args, limit, report):
    """Print check.py's table. A red row is told and stops nothing: the rest is tried."""

    def told(line):
        print(f"  {report.add('check', line)}", flush=True)

    follow([ROOT / "check.py"], limit, told, args.device)


def parity(args, limit, report):
    """Print a line for each comparison."""

    def told(row):
        report.add("parity", row)
        for word in ("skipped", "failed"):
            if word in row:
                print(f"  {row['checkpoint']:<32}{word}: {row[word]}", flush=True)
                return
        verdict = "ok" if row["ok"] else "TOO FAR"
        print(
            f"  {row['checkpoint']:<32}{row['what']:<19}{row['precision']:<10}{row['apart']:9.1e} apart, "
            f"{row['bound']:.1e} allowed: {verdict}",
            flush=True,
        )

    command = [ROOT / "bench" / "gpu_checks.py", "parity", *shared(args)]
    return follow(command, limit, as_json(told), args.device) or report.too_far("parity")


def steps(args, limit, report):
    """Run the steps on the card and on the CPU at once, and print a line for each case that both have made."""
    done, lock = {"here": {}, "cpu": {}}, threading.Lock()

    def told_by(place):
        def told(row):
            with lock:
                done[place][row["case"]] = row
                if all(row["case"] in each for each in done.values()):
                    compare(done["cpu"][row["case"]], done["here"][row["case"]], report)

        return as_json(told)

    command = [ROOT / "bench" / "gpu_checks.py", "steps", *(["--quick"] if args.quick else [])]
    with ThreadPoolExecutor(1) as pool:
        on_cpu = pool.submit(follow, [*command, "--device", "cpu"], limit, told_by("cpu"))
        problem = follow([*command, "--device", args.device], limit, told_by("here"), args.device)
    return problem or on_cpu.result() or report.too_far("steps")


def sampling(args, limit, report):
    """Print a line for each way of keeping weights and keys."""

    def told(row):
        report.add("sampling", row)
        print(
            f"  {row['way']:<18}{row['rows']:4d} rows, {row['tokens_a_pass']:7.0f} tokens a pass, "
            f"{row['seconds_a_pass']:.3f} s a pass, {row['responses_an_hour']:.0f} responses/h",
            flush=True,
        )

    command = [ROOT / "bench" / "gpu_sampling.py", "--vram_gb", args.vram_gb, *shared(args)]
    return follow(command, limit, as_json(told), args.device)


def compare(cpu, here, report):
    """Print and keep how far two runs of a case are apart."""
    row = {"case": cpu["case"], "cpu": cpu, "here": here, "ok": False}
    failed = [f"{place}: {each['failed']}" for place, each in (("cpu", cpu), ("here", here)) if "failed" in each]
    if failed:
        words = f"failed: {'; '.join(failed)}"
    else:
        bound = next(value for name, value in TOLERANCE.items() if name in row["case"])
        apart = {name: furthest(here[name], cpu[name]) for name in ("loss", "grad_norm")}
        row |= {"apart": apart, "bound": bound, "ok": max(apart.values()) <= bound}
        words = f"losses {apart['loss']:.1e} apart, norms {apart['grad_norm']:.1e}, {bound:g} allowed: "
        words += "ok" if row["ok"] else "TOO FAR"
    report.add("steps", row)
    print(f"  {row['case']:<28}{words}", flush=True)


def furthest(values, wanted):
    """The largest difference of two lists of numbers, as a share of the wanted ones; infinite for a missing number."""
    if len(values) != len(wanted) or None in values or None in wanted:
        return float("inf")
    return max(abs(value - want) / max(abs(want), 0.1) for value, want in zip(values, wanted))


def shared(args):
    """The flags that the parts' scripts share."""
    return ["--device", args.device, *(["--quick"] if args.quick else [])]


HEAD = (
    f"  {'row':<11}{'1e9 par':>8}{'tokens':>8}{'pairs/s':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'of ceiling':>11}"
    f"{'models':>8}{'demand':>8}{'GPU GiB':>9}{'host GiB':>10}"
)


def measure(name, args, limit, report):
    """Print a row of the table."""
    row = report.add("table", {"row": name, "what": ROWS[name][1]})

    def told(values):
        row.update(values)
        report.save()

    command = [ROOT / "bench" / "gpu_rows.py", name, "--steps", args.steps, "--vram_gb", args.vram_gb, *shared(args)]
    problem = follow(command, limit, as_json(told), args.device)
    if problem:
        row["failed"] = problem
        report.save()
    print(line_of(row), flush=True)
    return problem


def line_of(row):
    """A row of the table in a line, and its largest costs in another."""
    if "pairs_per_second" not in row:
        return f"  {row['row']:<11} not measured"
    gpu = "-" if row["gpu_gib"] is None else f"{row['gpu_gib']:.1f}"
    demand = "-" if row["on_demand"] is None else f"{row['on_demand']:.1%}"
    line = (
        f"  {row['row']:<11}{row['parameters'] / 1e9:8.2f}{row['tokens_per_forward']:8d}{row['pairs_per_second']:9.3f}"
        f"{row['tokens_per_second']:10.0f}{row['tflops']:9.3f}{row['of_ceiling']:11.3f}{row['models_a_pair']:8.2f}"
        f"{demand:>8}{gpu:>9}{row['host_gib']:10.1f}"
    )
    if "costs" in row:
        line += f"\n{'':14}{', '.join(f'{name} {share:.0%}' for name, share in row['costs'])}"
    return line


# --- all of it --------------------------------------------------------------------------------------------


def jobs(args):
    """[(name, seconds that it may take, function)] of what the arguments ask for, in order."""
    parts = {"check": check, "parity": parity, "steps": steps, "sampling": sampling}
    found = [(name, LIMITS[name], part) for name, part in parts.items() if name in args.parts]
    if "table" in args.parts:
        found += [(name, ROWS[name][0], functools.partial(measure, name)) for name in args.rows]
    return found


def read_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write what is found there, as it is found")
    parser.add_argument("--minutes", type=float, default=12, help="for all of it; what no longer fits is left out")
    parser.add_argument("--vram_gb", type=float, default=16.0, help="use no more of the card's memory in the table")
    parser.add_argument("--parts", nargs="+", choices=[*LIMITS, "table"], default=[*LIMITS, "table"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="of the table")
    parser.add_argument("--steps", type=int, default=2, help="of a row, after one that warms up")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few comparisons")
    args = parser.parse_args(argv)
    if not args.quick and not (args.device == "cuda" and torch.cuda.is_available()):
        raise files.InputError(
            "bench/gpu.py measures a CUDA card, and there is none; to see that it runs: --device cpu --quick"
        )
    return args


def main(argv=None):
    args, problems = read_arguments(argv), 0
    end = time.monotonic() + 60 * args.minutes
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    report = Report(args.json, device=args.device, vram_gb=args.vram_gb, not_measured=dict(NOT_MEASURED), **versions)
    for name, most, run in jobs(args):
        if name in LIMITS:
            print(name)
        elif name == args.rows[0]:
            print(f"table\n{HEAD}")
        limit = min(most, end - time.monotonic())
        if limit < LEAST:
            report.leave_out(name, f"no time was left of --minutes {args.minutes:g}")
            continue
        problem = run(args, limit, report)
        problems += problem is not None
        if problem:
            print(f"  {name}: {problem}", flush=True)
    for name, why in report.found["not_measured"].items():
        print(f"  {name:<11} not measured: {why}")
    return 1 if problems else 0


if __name__ == "__main__":
    exits.run(main)
