"""What does each estimator teach? Models with a flaw x estimators x seeds: what they solve after DPO on their pairs.

    python bench/learned.py --models tiny=examples/tiny slip=runs/habits/slip/sft/final \\
        --designs "spread 3x3" "spread 2x3" "stepwise 4x1 --order blocks --block_length 8" --seeds 1 2 3 --json FILE

For each model and seed the pairs are sampled once, as examples/improve.sh does. For each design they are scored, the
model is trained by DPO with that script's settings, and asked held-out problems. A design is an estimator, its T x R,
any flags of train_dpo.py; the first is what the others are compared with (McNemar's exact test, all seeds together).

A model is NAME=FOLDER, or NAME=FILE.json with the fields of Subject below, for other problems, pairs or sampler's
flags. With several --learning_rates each model and design takes the one that solves most on --tuning_seed, which is not
reported. Finished stages are kept in --work: run the same command to resume. Seconds are a processor's, for scores and
training, start-up included; of a stage that was stopped, those of the last start alone.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import jsonlines
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from habits import environment
from small import last_of_each

import files
from cli import exits
from reasoning import comparison

SETTINGS = "--use_mixed_precision no --gradient_checkpointing false --tokens_per_forward 4096 --logging_steps 20"
TRAINING = "--num_train_epochs 1 --gradient_accumulation_steps 16 --eval_fraction 0.1"
PLAIN = "--block_length 8"


class Subject(NamedTuple):
    """A model with a flaw: what it is asked and how. Without files, generated problems of `task`."""

    name: str
    model: str
    task: str = "arithmetic"
    pairs: str = ""  # preferences, the same for every seed; else they are sampled
    problems: str = ""  # problems to sample pairs from
    validation: str = ""  # problems of the tuning seed
    test: str = ""  # held-out problems
    sampler: str = "--gen_length 40"
    drawing: str = "--temperature 1 --block_length 1"  # the sampler's flags for pairs
    decoding: tuple = (PLAIN,)  # for held-out problems; a row of the table each
    max_length: int = 256

    def asked(self, args, is_tuning):
        """Flags of evaluate.py: the held-out problems."""
        path = self.validation if is_tuning else self.test
        return ["--limit", args.held_out, *(["--in", path] if path else ["--tasks", self.task])]


class Design(NamedTuple):
    name: str  # "spread 2x3 --noise_sets 2"

    @property
    def flags(self):
        estimator, size, *more = self.name.split()
        T, R = size.split("x")
        return ["--estimator", estimator, "--diffusion_steps", T, "--trajectories", R, *more]

    @property
    def folder(self):
        return re.sub(r"[^\w.]+", "-", self.name)


class Trained(NamedTuple):
    """One model after DPO."""

    solved: dict  # {decoding: [whether each held-out problem is solved]}
    pairs: int
    passes: int  # forward passes a response: states
    tokens: int  # forward-backward tokens of DPO
    seconds: float  # of a processor, for scores and training


# --- stages -----------------------------------------------------------------------------------------------


def execute(command, log):
    """Run a script, its output into the file `log`. Returns (exit code, processor seconds)."""
    with open(log, "w") as out:
        options = {"cwd": ROOT, "env": environment(), "stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([sys.executable, "bench/rivals.py", *command], **options)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def stage(folder, name, script, *flags):
    """Run a script unless it has finished with these flags; its output is in folder/NAME.log. Processor seconds."""
    command, record = [script, *last_of_each(flags)], folder / f"{name}.json"
    if record.is_file() and (done := files.read_json(record, "this command"))["command"] == command:
        return done["seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    code, seconds = execute(command, log)
    if code:
        raise files.InputError(f"{script} stopped with exit code {code}; see {log}")
    files.write_json(record, {"command": command, "seconds": seconds})
    return seconds


def common(subject, seed):
    settings = [*SETTINGS.split(), "--deepspeed", "ds_configs/zero0.json", "--max_length", subject.max_length]
    return [*settings, "--noise_seed", seed, "--seed", seed]


def sampling(subject):
    return ["--use_mixed_precision", "no", "--device", "cpu", "--batch_size", "64", *subject.sampler.split()]


def prepare(args, subject, seed):
    """The packed pairs of a model and seed."""
    folder = args.work / subject.name / f"seed-{seed}"
    pairs = subject.pairs or folder / "prefs.jsonl"
    if not subject.pairs:
        asked = ["--in", subject.problems] if subject.problems else ["--task", subject.task, "--num", args.problems]
        drawing = [*sampling(subject), *subject.drawing.split(), "--k", 8, "--pairs_per_prompt", 4]
        made = ["--model", subject.model, "--seed", f"{seed}1", "--out", pairs]
        stage(folder, "prefs", "make_prefs.py", "--strategy", "sample", *asked, *drawing, *made)
    rows = ["--in", pairs, "--out", folder / "packed", "--model_name_or_path", subject.model]
    stage(folder, "pack", "data_prep.py", "--reuse", *rows, *common(subject, seed))
    return folder


def solved(args, subject, seed, model, folder):
    """{decoding: [bool of each held-out problem]} of a model."""
    found, is_tuning = {}, seed == args.tuning_seed
    for number, decoding in enumerate(subject.decoding):
        name = f"evaluate-{number}"
        ask = [*subject.asked(args, is_tuning), *sampling(subject), *decoding.split(), "--seed", seed]
        stage(folder, name, "evaluate.py", "--model", model, *ask, "--output_dir", folder / name)
        [path] = files.read_json(folder / name / "results.json", "this command")["files"]
        with jsonlines.open(folder / name / path) as rows:
            found[decoding] = [row["correct"] is True for row in rows]
    return found


def base(args, subject, seed):
    """solved() of the model itself."""
    return solved(args, subject, seed, subject.model, args.work / subject.name / f"seed-{seed}" / "base")


def train(args, subject, seed, design, rate):
    """Score, train and ask: a Trained."""
    seed_folder = prepare(args, subject, seed)
    folder = seed_folder / design.folder / rate
    packed = folder.parent / "packed"  # with the scores of this design alone
    if not packed.exists():
        copy = packed.with_name("packed.partial")
        shutil.copytree(seed_folder / "packed", copy, dirs_exist_ok=True)
        copy.rename(packed)
    shared = ["--data", packed, *common(subject, seed), *design.flags]
    seconds = stage(folder.parent, "score", "score.py", *shared)
    output = ["--output_dir", folder / "dpo", "--learning_rate", rate]
    seconds += stage(folder, "train", "train_dpo.py", *TRAINING.split(), *output, *shared)
    [meta] = [files.read_json(path, "this command") for path in packed.glob("ref-*/meta.json")]
    with jsonlines.open(folder / "dpo" / "log.jsonl") as rows:
        tokens = list(rows)[-1]["num_tokens"]
    found = solved(args, subject, seed, folder / "dpo" / "final", folder)
    return Trained(found, meta["pairs"], meta["states"], tokens, seconds)


def best_rate(args, subject, design):
    """The learning rate that solves most problems of the tuning seed; the first of equals."""
    if len(args.learning_rates) == 1:
        return args.learning_rates[0]
    score = {}
    for rate in args.learning_rates:
        score[rate] = sum(train(args, subject, args.tuning_seed, design, rate).solved[subject.decoding[0]])
    return max(score, key=score.get)


# --- the table --------------------------------------------------------------------------------------------


def pooled(trained, decoding):
    """The verdicts of all seeds, one after the other."""
    return [verdict for each in trained for verdict in each.solved[decoding]]


def row_of(design, rate, trained, first, decoding):
    """A design's line for one model: trained, first: [Trained] of the seeds."""
    verdicts = pooled(trained, decoding)
    return {
        "design": design.name,
        "learning_rate": rate,
        "solved": float(np.mean(verdicts)),
        "by_seed": [float(np.mean(each.solved[decoding])) for each in trained],
        "passes": trained[0].passes,
        "pairs": float(np.mean([each.pairs for each in trained])),
        "tokens": float(np.mean([each.tokens for each in trained])),
        "seconds": float(np.mean([each.seconds for each in trained])),
        "against_first": comparison.paired(verdicts, pooled(first, decoding)),
    }


def show(row, is_first):
    test = row["against_first"]
    compared = "first" if is_first else f"{test['won']} won, {test['lost']} lost, p = {test['p']:.2g}"
    seeds = " ".join(f"{value:.3f}" for value in row["by_seed"])
    print(
        f"  {row['design']:<32}{row['solved']:>7.3f}  ({seeds}){compared:>30}{row['passes']:>5} passes"
        f"{row['seconds']:>6.0f} s  lr {row['learning_rate']}",
        flush=True,
    )


def table(args, subjects, designs, rates, trained, bases):
    """Print and return the tables, one for each model and decoding."""
    tables = []
    for subject in subjects:
        for decoding in subject.decoding:
            of = {design: [trained[subject, seed, design] for seed in args.seeds] for design in designs}
            start = float(np.mean([bases[subject, seed][decoding] for seed in args.seeds]))
            rows = [row_of(each, rates[subject, each], of[each], of[designs[0]], decoding) for each in designs]
            print(f"{subject.name}, {decoding}: solved before {start:.3f}; pairs {rows[0]['pairs']:.0f}")
            for row in rows:
                show(row, row is rows[0])
            tables.append({"model": subject.name, "decoding": decoding, "base": start, "rows": rows})
    return tables


# --- the command ------------------------------------------------------------------------------------------


def subject_of(text, decoding):
    """NAME=FOLDER, or NAME=FILE.json -> Subject."""
    name, _, value = text.partition("=")
    if not value:
        raise files.InputError(f"--models {text}: expected NAME=FOLDER of a model or NAME=FILE.json")
    given = {"model": value}
    if value.endswith(".json"):
        given = files.read_json(value, "a file with the fields of Subject")
    if unknown := ", ".join(sorted(given.keys() - set(Subject._fields))):
        raise files.InputError(f"{value}: no field {unknown}; there are {', '.join(Subject._fields)}")
    return Subject(**{"name": name} | given | {"decoding": tuple(given.get("decoding", decoding))})


def read_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--designs", nargs="+", default=["radau 2x3", "spread 3x3"], help="others against the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--learning_rates", nargs="+", default=["1e-4"])
    parser.add_argument("--tuning_seed", type=int, default=9)
    parser.add_argument("--problems", type=int, default=250, help="to sample pairs from")
    parser.add_argument("--held_out", type=int, default=300, help="problems to ask")
    parser.add_argument("--decoding", nargs="+", default=[PLAIN], help="the sampler's flags for them; several: each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "learned")
    parser.add_argument("--json", help="write the tables there")
    return parser.parse_args(argv)


def main(argv=None):
    # 1. What is asked for
    args = read_arguments(argv)
    args.work = args.work.absolute()
    subjects = [subject_of(text, tuple(args.decoding)) for text in args.models]
    designs = [Design(name) for name in args.designs]

    # 2. Pairs, learning rates, models: `jobs` at a time, finished stages are kept
    with ThreadPoolExecutor(args.jobs) as pool:

        def each(function, keys):
            """{key: function(args, *key)}"""
            return dict(zip(keys, pool.map(lambda key: function(args, *key), keys)))

        seeds = list(product(subjects, args.seeds))
        tuned = [(subject, args.tuning_seed) for subject in subjects] if len(args.learning_rates) > 1 else []
        each(prepare, list(dict.fromkeys(tuned + seeds)))
        bases = each(base, seeds)
        rates = each(best_rate, list(product(subjects, designs)))
        keys = [(*key, design, rates[key[0], design]) for key, design in product(seeds, designs)]
        trained = {key[:3]: made for key, made in each(train, keys).items()}

    # 3. What they have learned
    tables = table(args, subjects, designs, rates, trained, bases)
    if args.json:
        files.write_json(args.json, {"seeds": args.seeds, "held_out": args.held_out, "tables": tables})


if __name__ == "__main__":
    exits.run(main)
