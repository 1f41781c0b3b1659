"""KTO on single responses against DPO on the pairs they come from: held-out pairs told apart, on the embedded model.

    python bench/kto.py --seeds 0 1 2

Both train on examples/prefs.jsonl with the settings of configs/tiny.yaml and 7 states a response: DPO on steps of 8
pairs, KTO on steps of 16 responses, for as many epochs. A held-out pair is told apart if the gain (policy less
reference) of its chosen response is the larger one; KTO never sees which responses belong together. All is kept in
--work, and made once.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from reasoning import tasks  # noqa: E402

SETTINGS = ["--config_file", ROOT / "configs" / "tiny.yaml", "--report_to", "none", "--save_steps", "0"]
SETTINGS += ["--estimator", "spread"]
WAYS = {
    "DPO": [],
    "KTO": ["--task", "kto", "--loss_type", "kto", "--gradient_accumulation_steps", "16", "--eval_steps", "0"],
}


def run(script, *argv):
    subprocess.run([sys.executable, ROOT / script, *map(str, argv)], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def trained(way, seed, args):
    """The folder of a run, made once. seed: of the order of the data and of the held-out pairs."""
    data, folder = args.work / f"packed-{way}", args.work / f"{way}-{args.learning_rate:g}-{seed}"
    if not (folder / "final").exists():
        more = [*SETTINGS, *WAYS[way], "--data", data]
        run("data_prep.py", *more, "--reuse", "true")
        run("score.py", *more)
        more += ["--output_dir", folder, "--seed", seed, "--learning_rate", args.learning_rate]
        run("train_dpo.py", *more, *(["--max_steps", args.steps] if args.steps else []))
    return folder


def told_apart(folder):
    """(pairs,) bool: which held-out pairs the last evaluation of a run tells apart."""
    gains, last = defaultdict(dict), 0  # {line: {is chosen: gain}}
    for text in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        if row["split"] != "eval" or row["step"] < last:
            continue
        last = row["step"]
        gain = (np.array(row["policy"]) - np.array(row["ref"])).sum(-1)
        gains[row["line"]] |= {row["label"]: gain[0]} if "label" in row else dict(zip((True, False), gain))
    return np.array([pair[True] > pair[False] for pair in gains.values() if len(pair) == 2])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, help="default: those of configs/tiny.yaml's epochs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench-kto")
    args = parser.parse_args(argv)
    print("| way | held-out pairs told apart, by seed | all | 95% interval |\n|---|---|---|---|")
    for way in WAYS:
        found = [told_apart(trained(way, seed, args)) for seed in args.seeds]
        every = np.concatenate(found)
        low, high = tasks.wilson(every.mean(), len(every))
        seeds = ", ".join(f"{each.mean():.3f}" for each in found)
        print(f"| {way} | {seeds} | {every.mean():.3f} of {len(every)} | {low:.3f} to {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
