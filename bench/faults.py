"""Kill every stage at random moments, start it again with the same command, and compare with an undisturbed run.

    python bench/faults.py --kills 200 --seed 0 [--stages prep score train] [--deepspeed FILE]

Each trial starts a stage anew. While it runs it is sent SIGKILL, SIGTERM or SIGINT at a moment drawn over the length of
an undisturbed run, then started again, and so on, at most MOST times; then it is left to end. What must be the same to
the last bit: the packed arrays, the reference's noise and scores, the trained weights and every number of the log. A
model of 60,000 parameters; real DeepSpeed.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import small  # noqa: E402

import files  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOST = 4  # kills of one trial


class Stage:
    """One stage of the pipeline, in folders under `work`."""

    def __init__(self, work, name, deepspeed):
        self.work, self.name, self.deepspeed = work, name, deepspeed
        self.truth = None  # the result of an undisturbed run

    def command(self, folder):
        """The stage's command in `folder`."""
        where = ["--data", folder / "packed", "--model_name_or_path", self.work / "model"]
        if self.name == "prep":
            return [ROOT / "data_prep.py", "--in", self.work / "prefs.jsonl", "--num_proc", "2", *where]
        noise = small.flags(use_mixed_precision="no", diffusion_steps=3, trajectories=2, tokens_per_forward=200)
        if self.name == "score":
            return [ROOT / "score.py", *where, *noise]
        training = small.flags(learning_rate=3e-3, gradient_accumulation_steps=2, save_steps=1, max_steps=8)
        training += small.flags(eval_fraction=0.2, eval_steps=3, deepspeed=self.deepspeed, output_dir=folder / "run")
        return [ROOT / "train_dpo.py", *where, *noise, *training]

    def prepare(self, folder):
        """Make `folder` with what the stage starts from."""
        folder.mkdir()
        if self.name != "prep":
            left_out = shutil.ignore_patterns("ref-*" if self.name == "score" else "")
            shutil.copytree(self.work / "packed", folder / "packed", ignore=left_out)

    def result(self, folder):
        """{name: digest or value} of what must be the same."""
        if self.name == "train":
            return {
                "scores": files.file_sha256(folder / "run" / "scores.jsonl"),
                "weights": files.file_sha256(folder / "run" / "final" / "model.safetensors"),
                "log": small.numbers(folder / "run"),
            }
        packed, found = folder / "packed", {}
        for path in packed.glob("*.npy" if self.name == "prep" else "ref-*/*.npy"):
            found[str(path.relative_to(packed))] = files.file_sha256(path)
        return found | {"leftovers": [path.name for path in packed.rglob("*") if "chunks" in path.name]}


def make(work):
    """The model, preferences in words, packed/ with reference scores."""
    small.make_model(work / "model", ROOT / "examples" / "tiny")
    rows = (ROOT / "examples" / "prefs.jsonl").read_text().splitlines(keepends=True)[:40]
    (work / "prefs.jsonl").write_text("".join(rows))
    for name in ("prep", "score"):
        small.run(Stage(work, name, "").command(work))


def trial(stage, folder, rng, length, kills):
    """One trial; `kills` counts (stage, signal). Returns what is wrong, or ""."""
    stage.prepare(folder)
    for _ in range(MOST):
        process = small.start(stage.command(folder))
        try:
            process.wait(rng.uniform(0, length))
        except subprocess.TimeoutExpired:
            number = rng.choice(SIGNALS)
            process.send_signal(number)
            kills[stage.name, number.name] += 1
        said = process.communicate(timeout=600)[0]
        importing = "KeyboardInterrupt" in said and "exits.run(main)" not in said  # Python's own words, before ours
        if "Traceback" in said and not importing:
            return f"traceback:\n{said[-1500:]}"
        if process.returncode not in (0, *(-each for each in SIGNALS), 130) and not importing:
            return f"exit code {process.returncode}:\n{said[-1500:]}"
        if process.returncode == 0 and "stopped" not in said:
            break
    small.run(stage.command(folder))
    if (got := stage.result(folder)) != stage.truth:
        return f"another result: {[name for name in got if got[name] != stage.truth.get(name)]}"
    return ""


class Kills(NamedTuple):
    """What measure() did."""

    counts: Counter  # of (stage, signal)
    trials: int
    wrong: list  # of sentences


def measure(work, names, wanted, seed, deepspeed, report=print):
    """Trials until `wanted` kills are made: Kills."""
    make(work)
    stages, rng, kills, wrong, trials = [], random.Random(seed), Counter(), [], 0
    for name in names:
        stage = Stage(work, name, deepspeed)
        stage.prepare(work / f"truth-{name}")
        began = time.time()
        small.run(stage.command(work / f"truth-{name}"))
        stages.append((stage, time.time() - began))
        stage.truth = stage.result(work / f"truth-{name}")
    while kills.total() < wanted:
        stage, length = stages[trials % len(stages)]
        folder = work / f"trial-{trials}"
        if bad := trial(stage, folder, rng, length, kills):
            wrong.append(f"{stage.name}, {folder}: {bad}")
            report(wrong[-1])
        else:
            shutil.rmtree(folder)
        trials += 1
        print(f"{kills.total()} kills, {trials} trials, {len(wrong)} wrong", file=sys.stderr, flush=True)
    return Kills(kills, trials, wrong)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=("prep", "score", "train"), default=["prep", "score", "train"])
    parser.add_argument("--deepspeed", default=str(ROOT / "ds_configs" / "zero3_offload_4080.json"))
    args = parser.parse_args(argv)
    began = time.time()

    def report(line):
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as work:
        kills, trials, wrong = measure(Path(work), args.stages, args.kills, args.seed, args.deepspeed, report)
    print(f"{'stage':8}" + "".join(f"{each.name:>10}" for each in SIGNALS))
    for name in args.stages:
        print(f"{name:8}" + "".join(f"{kills[name, each.name]:10d}" for each in SIGNALS))
    minutes = (time.time() - began) / 60
    print(f"{kills.total()} kills in {trials} trials, {len(wrong)} with another result; {minutes:.0f} minutes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
