"""A run's numbers as they come: a line on the terminal, log.jsonl, scores.jsonl, TensorBoard, Weights & Biases.

    runs/NAME/log.jsonl         a line for each step: TRL's metrics, times, memory
    runs/NAME/scores.jsonl      a line for each scored pair: {"step", "split": train or eval, "pair", "line" in the
                                source, "policy" and "ref": scores of each state of [chosen, rejected]; null for a
                                ref that the loss does not have}
    runs/NAME/events.out.*      TensorBoard's:  tensorboard --logdir runs

TensorBoard and W&B get the names that transformers' callbacks give to TRL's ("train/rewards/margins", "eval/loss"), so
that runs can be compared. On a terminal the line is rewritten pair by pair; elsewhere there is one every
--logging_steps. Only rank 0 writes.
"""

import importlib.util
import json
import os
import secrets
import shutil
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from files import InputError, naming, no_room, replacing
from training import guard, memory, runs

# --- sums over ranks --------------------------------------------------------------------------------------


class Totals(NamedTuple):
    """Sums over the pairs of every rank."""

    metrics: list  # of floats, as objective.measure() has them
    pairs: float
    tokens: float  # that went through the model


def add_up_over_ranks(sums, tokens):
    """The Totals of every rank's sums. This communicates: every rank must call it.

    sums: (M + 1,) float64, this rank's sums of M metrics and its number of pairs.
    """
    everything = torch.cat((sums, sums.new_tensor([tokens])))  # (M + 2,)
    dist.all_reduce(everything)
    *metrics, pairs, tokens = everything.tolist()
    return Totals(metrics, pairs, tokens)


def means(objective, totals, prefix=""):
    """{prefix + name: mean} of the objective's metrics; None for one that is not finite."""
    return {prefix + name: guard.plain(value) for name, value in objective.means(totals).items()}


# --- the time left ----------------------------------------------------------------------------------------


class Clock:
    """What a run does after which step, and the seconds that it still takes.

    Steps to come are timed by their tokens, at the pace of the later half of the steps so far; evaluations and saves by
    the mean of those so far.

    tokens: (steps to come,) through the model in each step. evaluation: tokens of one evaluation, 0 if no pair is held
    out. start: steps that are done.
    """

    def __init__(self, tokens, evaluation, eval_steps, save_steps, start):
        self.start, self.steps, self.evaluation = start, start + len(tokens), evaluation
        coming = np.arange(start + 1, self.steps + 1)
        last = coming == self.steps
        self.evaluates = (multiples(coming, eval_steps) | last) & (evaluation > 0)
        self.saves = multiples(coming, save_steps)
        self.tokens_left = onwards(tokens)
        self.evaluations_left = onwards(self.evaluates)
        self.saves_left = onwards(self.saves)
        self.took = [0.0]  # seconds of the first 0, 1, 2 ... steps together
        self.evaluation_seconds, self.save_seconds = [], []  # of each

    def evaluation_due(self, step):
        """Whether an evaluation follows `step` (1-based)."""
        return bool(self.evaluates[step - self.start - 1])

    def save_due(self, step):
        """Whether a checkpoint follows `step` (1-based)."""
        return bool(self.saves[step - self.start - 1])

    def left(self, step, evaluated):
        """Seconds left after `step` (1-based). evaluated: whether that step's evaluation, if one is due, is done."""
        timed, done = len(self.took) - 1, step - self.start
        first = max(timed // 2, 1) if timed > 1 else 0  # the first step also warms up
        pace = (self.took[timed] - self.took[first]) / (self.tokens_left[first] - self.tokens_left[timed])
        # Until one is made: a third of a step's pace, as a step also goes backward, which is twice the work.
        evaluation = mean(self.evaluation_seconds, self.evaluation * pace / 3)
        evaluations = self.evaluations_left[done if evaluated else done - 1]
        seconds = self.tokens_left[done] * pace
        seconds += evaluations * evaluation
        seconds += self.saves_left[done] * mean(self.save_seconds, 0)
        return float(seconds)

    def stepped(self, seconds):
        """A step took so many seconds."""
        self.took.append(self.took[-1] + seconds)

    def time(self, seconds, act, *args):
        """Call act(*args) and return what it returns; how long it took is appended to the list `seconds`."""
        began = time.time()
        result = act(*args)
        seconds.append(time.time() - began)
        return result


def multiples(numbers, of):
    """Which of `numbers` (n,) are multiples of a number: (n,) bool; none if it is 0."""
    return numbers % of == 0 if of else np.zeros(len(numbers), bool)


def onwards(values):
    """(n + 1,): the sum of `values` (n,) from each place on."""
    return np.append(values[::-1].cumsum()[::-1], 0)


def mean(values, otherwise):
    """The mean of a list, or `otherwise` if it is empty."""
    return sum(values) / len(values) if values else otherwise


# --- lines and files --------------------------------------------------------------------------------------


def new_record(job, run, held_out_pairs, start):
    """The Record of a run that has done `start` steps. Its clock knows the tokens of every step to come."""
    per_step, tokens = job.pairs_per_step, job.objective.tokens()
    places = range(start * per_step, job.steps * per_step)
    of_pairs = np.array([tokens[job.stream[place][0]] for place in places])
    of_steps = of_pairs.reshape(-1, per_step).sum(1)
    clock = Clock(of_steps, int(tokens[held_out_pairs].sum()), job.args.eval_steps, job.args.save_steps, start)
    return Record(run, job.ranks, job.args, job.objective, held_out_pairs, clock, per_step)


class Record:
    """Writes down what a run computes.

    ranks, args, objective: as in train_dpo.Job. held_out: pairs. per_step: pairs in a step, of all ranks.
    """

    def __init__(self, run, ranks, args, objective, held_out, clock, per_step):
        self.run, self.ranks, self.args, self.objective, self.held_out = run, ranks, args, objective, held_out
        self.clock, self.per_step, self.steps = clock, per_step, clock.steps
        self.live = ranks.first and sys.stdout.isatty()
        self.last_line, self.previous_step, self.trackers = None, clock.start, []
        self.evaluation = {}  # the metrics of the last one
        self.passes_of, self.passes = None, 0  # a step, and its forward passes so far

    def open(self, arguments, first_step):
        """Start the trackers of --report_to. arguments: of the run. first_step: the next that they get (1-based)."""
        if self.ranks.first:
            for name in names(self.args.report_to):
                self.trackers.append(TRACKERS[name](self.run, self.args, arguments, first_step))

    def close(self):
        for tracker in self.trackers:
            tracker.close()

    def pairs(self, step, split, pieces):
        """Write [(item, loss, scores)] of this rank to scores.jsonl. This communicates: every rank must call it."""
        if len(self.objective.metrics) == 1:
            return  # SFT has neither pairs nor states
        entries = [self.objective.entry(item, scores) for item, _, scores in pieces]
        of_ranks = self.ranks.gather(entries)
        if self.ranks.first:
            head = {"step": step, "split": split}
            self.run.add(self.run.scores_path, [head | entry for rank in of_ranks for entry in rank])

    def step(self, line, evaluation):
        """Write down a step's line and the metrics of the evaluation after it, {} if none was made."""
        before, self.evaluation = self.evaluation, evaluation or self.evaluation
        if not self.ranks.first:
            return
        self.last_line = line = line | evaluation
        self.run.add(self.run.log_path, [line])
        numbers = tracked(line)
        for tracker in self.trackers:
            tracker.log(line["step"], numbers)
        first_or_last = self.previous_step in (self.clock.start, self.steps - 1)
        if evaluation or first_or_last or line["step"] % self.args.logging_steps == 0:
            self.print(self.words(line))
        self.previous_step = line["step"]
        if evaluation:
            tokens = self.objective.chosen_tokens(self.held_out)
            for words in guard.falling(evaluation, before, tokens, self.args.beta):
                self.print(f"warning: {words}")

    def print(self, words):
        """Print a line that stays."""
        print(("\r\x1b[K" if self.live else "") + words, flush=True)

    def rewrite(self, words):
        """On a terminal: print a line that the next one replaces."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write(f"\r\x1b[K{words[:width]}")
            sys.stdout.flush()

    def passed(self, step):
        """On a terminal: show that a forward pass of `step` (0-based) is done."""
        if not self.live:
            return
        self.passes = self.passes + 1 if step == self.passes_of else 1
        self.passes_of = step
        place = f"step {step + 1}/{self.steps} | pass {self.passes}"
        self.rewrite(self.words(self.last_line, place) if self.last_line else place)

    def words(self, line, place=None):
        """A step as a line for people. place: what to begin with, if not with the step's own place."""
        if place is None:
            pairs = f"pair {line['step'] * self.per_step}/{self.steps * self.per_step}"
            place = f"step {line['step']}/{self.steps} | {pairs}"
        words = [place, "skipped" if line["skipped"] else f"loss {line['loss']:.4f}"]
        if line.get("rewards/margins") is not None and not line["skipped"]:  # None: a step of KTO's without both kinds
            words.append(f"margin {line['rewards/margins']:+.3f}")
        if "rewards/accuracies" in line and not line["skipped"]:
            words.append(f"accuracy {line['rewards/accuracies']:.2f}")
        if "eval_loss" in line:
            words += ["eval loss not finite" if line["eval_loss"] is None else f"eval loss {line['eval_loss']:.4f}"]
        if "eval_rewards/accuracies" in line:
            low, high = line["eval_rewards/accuracies_ci95"]
            words += [f"eval accuracy {line['eval_rewards/accuracies']:.3f} [{low:.3f}, {high:.3f}]"]
        words += [f"lr {line['learning_rate']:.1e}"]
        words += [f"{line['pairs_per_second']:.2f} pairs/s", f"{line['tokens_per_second']:.0f} tok/s"]
        gpu = "" if line["gpu_peak_gib"] is None else f"GPU {line['gpu_peak_gib']:.1f} GiB, "
        words += [f"{gpu}host {line['host_peak_gib']:.1f} GiB"]
        left = round(line["seconds_left"])
        words += [f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"]
        return " | ".join(words)


def tracked(line):
    """{name: value} of the numbers that TensorBoard and W&B get of a line of the log, under TRL's names."""
    found = {}
    for name, value in line.items():
        if isinstance(value, (int, float)) and name not in ("step", "skipped", "seconds_left"):
            of_evaluation = name.startswith("eval_")
            found[name.replace("eval_", "eval/", 1) if of_evaluation else f"train/{name}"] = value
    return found


def measured(job, step, totals, seconds):
    """The part of the line of `step` (0-based) that its Totals give. seconds: that it took."""
    gpu, host = memory.memory_peaks(job.ranks.device)
    return {
        "step": step + 1,
        "epoch": round((step + 1) * totals.pairs / len(job.stream.train), 4),
        **means(job.objective, totals),
        "pairs_per_second": totals.pairs / seconds,
        "tokens_per_second": totals.tokens / seconds,
        "gpu_peak_gib": gpu,
        "host_peak_gib": host,
    }


# --- trackers ---------------------------------------------------------------------------------------------


class TensorBoard:
    """Events in the run's folder. Those that an earlier process wrote of steps that are made again are purged."""

    def __init__(self, run, args, arguments, first_step):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.path = run.folder / "events.out.tfevents"
        self.previous_hook, threading.excepthook = threading.excepthook, self.hear
        plain = {name: value if isinstance(value, (int, float)) else str(value) for name, value in arguments.items()}
        with naming(self.path):
            self.writer = SummaryWriter(str(run.folder), purge_step=first_step)
            self.writer.add_text("args", "```json\n" + json.dumps(arguments, indent=2) + "\n```")
            for summary in hparams(plain, {}):
                self.writer.file_writer.add_summary(summary)

    def hear(self, failed):
        """threading.excepthook: a full disk in TensorBoard's own thread is raised by flush() in ours, too."""
        of_tensorboard = type(failed.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and no_room(failed.exc_value)):
            self.previous_hook(failed)

    def log(self, step, numbers):
        with naming(self.path):
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()  # if the run is killed, nothing is lost

    def close(self):
        with naming(self.path):
            self.writer.close()
        threading.excepthook = self.previous_hook


class WandB:
    """A run of Weights & Biases in runs/NAME/wandb/; a resumed run keeps its id. WANDB_PROJECT and WANDB_MODE work."""

    def __init__(self, run, args, arguments, first_step):
        import wandb

        ident = run.folder / "wandb.id"
        if first_step == 1 or not ident.exists():  # a new start is another run in W&B, too
            with replacing(ident) as file:
                file.write(secrets.token_hex(4))
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "huggingface"),
                name=args.run_name or runs.without_home(args.output_dir),
                config=arguments,
                dir=str(run.folder),
                id=ident.read_text(),
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            why = " ".join(str(error).split())[:200]
            raise InputError(
                f"--report_to wandb: {why}; log in (wandb login), set WANDB_MODE=offline, or leave it out"
            ) from None
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, step, numbers):
        self.run.log(numbers | {"train/global_step": step})

    def close(self):
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def names(text):
    """The trackers of --report_to. Raises InputError for one that is unknown or not installed."""
    found = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    for name in found:
        if name not in TRACKERS:
            raise InputError(
                f"--report_to {text}: no tracker {name}; expected {', '.join(TRACKERS)}, both with a comma, or none"
            )
        if importlib.util.find_spec(name) is None:
            file = "requirements-wandb.txt" if name == "wandb" else "requirements.txt"
            raise InputError(
                f"--report_to {text}: {name} is not installed; run: pip install -r {file}, or give --report_to none"
            )
    return found
