"""A long run at small size: host memory, open files and step time must stay flat, and the log be as long as the run.

    python bench/soak.py [--steps 3000] [--deepspeed ds_configs/zero3_offload_4080.json]

A model of 60,000 parameters, one pair a step, a checkpoint every 100 steps of which two are kept. Resident memory and
open files are read from /proc every half second. The table has the median over each tenth of the steps, and the ratio
of the last one to the second: what only warms up levels off.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import small  # noqa: E402


def watch(process, log):
    """[(steps done, MiB resident, open files)] from the first step until the process ends."""
    seen = []
    while process.poll() is None:
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:
            break
        if log.exists():
            steps = log.read_bytes().count(b"\n")
            seen.append((steps, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files))
        time.sleep(0.5)
    return seen


def tenths(values, steps):
    """The median of the values of each tenth of the steps, nan for none. values: [(step, value)]."""
    parts = [[] for _ in range(10)]
    for step, value in values:
        if 0 < step <= steps:
            parts[math.ceil(10 * step / steps) - 1].append(value)
    return [statistics.median(part) if part else math.nan for part in parts]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--deepspeed", default=str(ROOT / "ds_configs" / "zero3_offload_4080.json"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        model = small.make_model(work / "model", ROOT / "examples" / "tiny")
        data = small.pack(work / "packed", small.make_pairs([(5, 9, 11)] * 40, 3), model)
        noise = ["--data", data, *small.flags(use_mixed_precision="no", diffusion_steps=2, trajectories=1)]
        small.run([ROOT / "score.py", *noise])
        training = small.flags(max_steps=args.steps, save_steps=100, gradient_accumulation_steps=1)
        training += small.flags(eval_fraction=0.1, eval_steps=500, logging_steps=10**6)
        where = ["--deepspeed", args.deepspeed, "--output_dir", work / "run"]
        process = small.start([ROOT / "train_dpo.py", *noise, *training, *where])
        began, seen = time.time(), watch(process, work / "run" / "log.jsonl")
        said = process.communicate()[0]
        if process.returncode:
            sys.exit(said[-3000:])
        lines = small.log(work / "run")
        assert [line["step"] for line in lines] == list(range(1, args.steps + 1))
        size = (work / "run" / "log.jsonl").stat().st_size / len(lines)
        print(f"{args.steps} steps, {time.time() - began:.0f} s, log of {size:.0f} bytes a step")
        for name, values in (
            ("resident MiB", [each[:2] for each in seen]),
            ("open files", [each[::2] for each in seen]),
            ("ms a step", [(line["step"], 1e3 / line["pairs_per_second"]) for line in lines]),
        ):
            medians = tenths(values, args.steps)
            shown = "".join(f"{median:8.1f}" for median in medians)
            print(f"{name:14}{shown}   ratio {medians[9] / medians[1]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
