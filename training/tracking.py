"""A run's numbers as they come: a line on the terminal, log.jsonl, scores.jsonl, TensorBoard, Weights & Biases.

    runs/NAME/log.jsonl         a line a step: TRL's metrics, times, memory
    runs/NAME/scores.jsonl      a line a scored pair: {"step", "split": train or eval, "pair", "line": its line in the source,
                                "policy", "ref": scores of each state of [chosen, rejected]}
    runs/NAME/events.out.*      TensorBoard's:  tensorboard --logdir runs

TensorBoard and W&B get the names that transformers' callbacks give TRL's ("train/rewards/margins", "eval/loss"), so that runs line up.
On a terminal the line is rewritten pair by pair; elsewhere there is one every --logging_steps. Only rank 0 writes.
"""

import importlib.util
import json
import os
import secrets
import shutil
import sys
import threading
import time

import numpy as np

from files import InputError, naming, no_room, replacing
from training import guard, memory, runs


class Clock:
    """What a run does after which step, and the seconds that it still takes: the tokens to come at the pace of the later half of the
    steps, evaluations and saves as they were.

    tokens: (steps to come,) through the model in each; evaluation: those of one evaluation, 0 where no pair is held out.
    """

    def __init__(self, tokens, evaluation, eval_steps, save_steps, start):
        self.start, self.steps, self.evaluation = start, start + len(tokens), evaluation
        coming = np.arange(start + 1, self.steps + 1)
        every = lambda n: coming % n == 0 if n else coming < 0  # noqa: E731
        self.evaluates, self.saves = (every(eval_steps) | (coming == self.steps)) & (evaluation > 0), every(save_steps)
        self.tokens_left, self.evaluations_left, self.saves_left = map(onwards, (tokens, self.evaluates, self.saves))
        self.took, self.evaluation_seconds, self.save_seconds = [0.0], [], []  # of so many steps together; of each

    def due(self, step):
        """(whether an evaluation follows `step` (1-based), whether a save does)."""
        return bool(self.evaluates[step - self.start - 1]), bool(self.saves[step - self.start - 1])

    def left(self, step, evaluated):
        """After `step` (1-based). evaluated: whether that step's evaluation, if it is to have one, is behind us."""
        steps, behind = len(self.took) - 1, step - self.start
        first = max(steps // 2, 1) if steps > 1 else 0  # the first step also warms up
        pace = (self.took[steps] - self.took[first]) / (self.tokens_left[first] - self.tokens_left[steps])
        evaluation = mean(
            self.evaluation_seconds, self.evaluation * pace / 3
        )  # until one is made: a step goes back, too, twice the work
        return float(
            self.tokens_left[behind] * pace
            + self.evaluations_left[behind - (not evaluated)] * evaluation
            + self.saves_left[behind] * mean(self.save_seconds, 0)
        )

    def stepped(self, seconds):
        self.took.append(self.took[-1] + seconds)

    def time(self, seconds, act, *args):
        """What act(*args) returns; how long it took joins the list `seconds`."""
        began = time.time()
        made = act(*args)
        seconds.append(time.time() - began)
        return made


def onwards(values):
    """(n + 1,): the sum of `values` (n,) from each place on."""
    return np.append(values[::-1].cumsum()[::-1], 0)


def mean(values, otherwise):
    return sum(values) / len(values) if values else otherwise


class Record:
    """Takes what a run makes and writes it down. ranks, args, objective as in train_dpo.Job; per_step: pairs a step, of all ranks."""

    def __init__(self, run, ranks, args, objective, held, clock, per_step):
        self.run, self.ranks, self.args, self.objective, self.held = run, ranks, args, objective, held
        self.clock, self.per_step, self.steps = clock, per_step, clock.steps
        self.live = ranks.first and sys.stdout.isatty()
        self.last, self.trackers, self.said = None, [], clock.start

    def open(self, arguments, first):
        """Start the trackers of --report_to, with the run's arguments. first: the step (1-based) that they are told of next."""
        if self.ranks.first:
            self.trackers = [
                TRACKERS[name](self.run, self.args, arguments, first) for name in names(self.args.report_to)
            ]

    def close(self):
        for tracker in self.trackers:
            tracker.close()

    def pairs(self, step, split, pieces):
        """[(item, loss, scores)] of this rank, to scores.jsonl."""
        if len(self.objective.metrics) == 1:
            return  # SFT: neither pairs nor states
        entries = sum(self.ranks.gather([self.objective.entry(item, scores) for item, _, scores in pieces]), [])
        if self.ranks.first:
            self.run.add(self.run.scores_path, [{"step": step, "split": split, **entry} for entry in entries])

    def step(self, line, evaluation, before):
        """A step's numbers and, where one was made, its evaluation's; before: those of the evaluation before it."""
        if not self.ranks.first:
            return
        self.last = line = line | evaluation
        self.run.add(self.run.log_path, [line])
        numbers = {
            name if name.startswith("eval/") else f"train/{name}": value
            for name, value in ((name.replace("eval_", "eval/", 1), value) for name, value in line.items())
            if isinstance(value, (int, float)) and name not in ("step", "skipped", "seconds_left")
        }
        for tracker in self.trackers:
            tracker.log(line["step"], numbers)
        if evaluation or self.said in (self.clock.start, self.steps - 1) or line["step"] % self.args.logging_steps == 0:
            self.print(self.words(line))
        self.said = line["step"]
        if evaluation:
            for words in guard.falling(evaluation, before, self.objective.chosen_tokens(self.held), self.args.beta):
                self.print(f"warning: {words}")

    def print(self, words):
        """A line that stays."""
        print(("\r\x1b[K" if self.live else "") + words, flush=True)

    def rewrite(self, words):
        """On a terminal: the line that the next one replaces."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write(f"\r\x1b[K{words[:width]}")
            sys.stdout.flush()

    def pair(self, step, pieces):
        """This rank's [(item, loss, scores)] of the step (0-based) have been through the model, and as many on the others."""
        if self.live:
            done = sum(len(item) if isinstance(item, list) else 1 for item, _, _ in pieces) * self.ranks.world
            pairs = f"step {step + 1}/{self.steps} | pair {step * self.per_step + done}/{self.steps * self.per_step}"
            self.rewrite(self.words(self.last, pairs) if self.last else pairs)

    def words(self, line, head=None):
        """A step as a line for people."""
        pairs = f"pair {line['step'] * self.per_step}/{self.steps * self.per_step}"
        words = [
            head or f"step {line['step']}/{self.steps} | {pairs}",
            "skipped" if line["skipped"] else f"loss {line['loss']:.4f}",
        ]
        if "rewards/margins" in line and not line["skipped"]:
            words += [f"margin {line['rewards/margins']:+.3f}", f"accuracy {line['rewards/accuracies']:.2f}"]
        if "eval_loss" in line:
            words += ["eval loss not finite" if line["eval_loss"] is None else f"eval loss {line['eval_loss']:.4f}"]
        if "eval_rewards/accuracies" in line:
            low, high = line["eval_rewards/accuracies_ci95"]
            words += [f"eval accuracy {line['eval_rewards/accuracies']:.3f} [{low:.3f}, {high:.3f}]"]
        gpu = "" if line["gpu_peak_gib"] is None else f"GPU {line['gpu_peak_gib']:.1f} GiB, "
        left = round(line["seconds_left"])
        return " | ".join(
            words
            + [
                f"lr {line['learning_rate']:.1e}",
                f"{line['pairs_per_second']:.2f} pairs/s",
                f"{line['tokens_per_second']:.0f} tok/s",
                f"{gpu}host {line['host_peak_gib']:.1f} GiB",
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
            ]
        )


class TensorBoard:
    """Events in the run's folder; what an earlier process wrote of steps that are done again is purged."""

    def __init__(self, run, args, arguments, first):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writing = lambda: naming(run.folder / "events.out.tfevents")
        threading.excepthook = lambda args: (
            None if no_room(args.exc_value) else threading.__excepthook__(args)
        )  # flush raises it, too
        with self.writing():
            self.writer = SummaryWriter(str(run.folder), purge_step=first)
            self.writer.add_text("args", "```json\n" + json.dumps(arguments, indent=2) + "\n```")
            for summary in hparams(
                {name: value if isinstance(value, (int, float)) else str(value) for name, value in arguments.items()},
                {},
            ):
                self.writer.file_writer.add_summary(summary)

    def log(self, step, numbers):
        with self.writing():
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()  # a killed run has lost nothing

    def close(self):
        with self.writing():
            self.writer.close()


class WandB:
    """A run of Weights & Biases under runs/NAME/wandb/; one that goes on has the same id. WANDB_PROJECT, WANDB_MODE as W&B reads them."""

    def __init__(self, run, args, arguments, first):
        import wandb

        ident = run.folder / "wandb.id"
        if first == 1 or not ident.exists():  # begun anew: another run there, too
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
            raise InputError(
                f"--report_to wandb: {' '.join(str(error).split())[:200]}; log in (wandb login), set WANDB_MODE=offline, or "
                "leave it out"
            ) from None
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, step, numbers):
        self.run.log(numbers | {"train/global_step": step})

    def close(self):
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def names(text):
    """The trackers of --report_to, all of which are installed."""
    found = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    for name in found:
        if name not in TRACKERS:
            raise InputError(
                f"--report_to {text}: no tracker {name}; expected {', '.join(TRACKERS)}, both with a comma, or none"
            )
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"--report_to {text}: {name} is not installed; run: pip install -r "
                f"requirements{'-wandb' if name == 'wandb' else ''}.txt, or give --report_to none"
            )
    return found


def measured(job, step, sums, seconds):
    """The part of a step's line that its sums over all ranks give."""
    pairs, tokens = sums[len(job.objective.metrics)], sums[-1]
    gpu, host = memory.memory_peaks(job.ranks.device)
    return {
        "step": step + 1,
        "epoch": round((step + 1) * pairs / len(job.stream.train), 4),
        **named(job.objective.metrics, sums),
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": tokens / seconds,
        "gpu_peak_gib": gpu,
        "host_peak_gib": host,
    }


def named(metrics, sums, prefix=""):
    """Means by name of sums whose last but one, or last, is the number of pairs."""
    return {prefix + name: guard.plain(float(value / sums[len(metrics)])) for name, value in zip(metrics, sums)}
