"""A run as report.py shows it, read from its folder: arguments, log, packed arrays, scored pairs.

    runs/NAME/ (run.json, log.jsonl, scores.jsonl, skipped.jsonl), packed/ -> History

A run may be running, killed or moved: broken lines are left out and counted, and what is gone is named in `missing`.
"""

import fcntl
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

import losses
from files import InputError, read_sealed
from preferences.packed import Packed
from reporting import jsonl, scored_pairs
from training import runs


@dataclass
class History:
    folder: Path
    name: str
    record: dict
    log: dict  # {column: (steps,) float64, nan where there is none}
    intervals: dict  # {step: [low, high]}: 95% interval of the held-out accuracy
    unread: int  # lines of log.jsonl that cannot be read
    state: str  # finished, running or stopped
    packed: Optional[Packed] = None
    scored: Optional[scored_pairs.Scored] = None
    skipped: list = field(default_factory=list)
    missing: list = field(default_factory=list)  # sentences: what cannot be shown, and why
    tokenizer: Any = None

    @property
    def arguments(self):
        return self.record["arguments"]

    @property
    def sft(self):
        return self.arguments["loss_type"] == "sft"

    @property
    def noun(self):
        """What the run's work is counted in."""
        return "pairs" if self.loss.tasks == ("preferences",) else "rows"

    @property
    def plain_dpo(self):
        """Whether the loss is DPO's own, which is ln 2 before anything is learned."""
        args = self.arguments
        return args["loss_type"] == "sigmoid" and not args["label_smoothing"] and not args["sft_weight"]

    @property
    def loss(self):
        """The row of losses.LOSSES that rewards are shown for."""
        return losses.leading(self.arguments["loss_type"])

    @property
    def unit(self):
        """What rewards are measured in: beta * gain (losses.py)."""
        return "nats per token" if self.loss.is_per_token else "nats"

    @property
    def reward_axis(self):
        of = "log-ratio" if self.loss.has_reference else "log-likelihood"
        return "reward (nats per token)" if self.loss.is_per_token else f"reward (beta \u00d7 {of}, nats)"

    @property
    def margin_axis(self):
        return f"reward margin ({self.unit})"

    @property
    def skipped_steps(self):
        """Steps whose gradient was not finite."""
        skipped = self.log.get("skipped", np.zeros(0)) > 0
        return self.log["step"][: len(skipped)][skipped].astype(int).tolist()

    @property
    def last_interval(self):
        """[low, high] of the last held-out accuracy, or None."""
        return self.intervals[max(self.intervals)] if self.intervals else None

    def column(self, name):
        """(steps, values) of a column where it has finite values."""
        values = self.log.get(name, np.zeros(0))
        there = np.isfinite(values)
        return self.log["step"][: len(values)][there].astype(int), values[there]

    def last(self, name):
        """The last finite value of a column, or None."""
        values = self.column(name)[1]
        return float(values[-1]) if len(values) else None

    @property
    def steps_done(self):
        return int(self.log["step"][-1]) if len(self.log["step"]) else 0

    @property
    def pairs_a_step(self):
        """Pairs of an optimizer step, of all ranks."""
        return math.prod(
            self.arguments[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "ranks")
        )


# --- the folder -------------------------------------------------------------------------------------------


def read(folder):
    """The History of a run's folder; InputError if it is not one."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise InputError(
            f"{folder}: holds no run.json; expected the --output_dir of a run that has started, such as runs/tiny "
            "(train with bash launch.sh)"
        )
    run, record = runs.Run(folder), read_sealed(folder / "run.json", "training again")
    loss_type = record["arguments"]["loss_type"]
    if unknown := set(loss_type.split(",")) - losses.LOSSES.keys():
        raise InputError(
            f"{folder}: a run of --loss_type {loss_type}, and losses.py has no {', '.join(sorted(unknown))}"
        )
    state = "stopped"
    if run.finished:
        state = "finished"
    elif is_locked(folder / ".lock"):
        state = "running"
    log, intervals, unread = read_log(run.log_path)
    found = History(
        folder=folder,
        name=runs.without_home(os.path.normpath(folder)),
        record=record,
        log=log,
        intervals=intervals,
        unread=unread,
        state=state,
        skipped=list(jsonl.rows_of(run.skipped_path)),
    )
    found.packed = find_packed(found)
    if found.noun == "pairs":
        found.scored = scored_pairs.read(found)
        if found.arguments["estimator"] == "elbo":
            found.missing.append(
                "There is no margin by denoising step: the levels of elbo are random and have no step."
            )
    return found


def is_locked(path):
    """Whether a process of this machine has locked `path`. Tries a shared lock and gives it back at once."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


class Log(NamedTuple):
    columns: dict  # {column: (steps,) float64, nan where a line has none}
    intervals: dict  # {step: [low, high]} of the held-out accuracy
    unread: int  # lines that cannot be read


def read_log(path):
    """The Log in log.jsonl; of a step that was written twice, the later line."""
    lines, intervals, unread = {}, {}, 0
    with open(path if path.is_file() else os.devnull, "rb") as file:
        for text in file:
            row = jsonl.parsed(text)
            interval = row.pop("eval_rewards/accuracies_ci95", None) if row else None
            has_numbers = row and all(value is None or isinstance(value, (int, float)) for value in row.values())
            if not has_numbers or type(row.get("step")) is not int:
                unread += 1
                continue
            lines[row["step"]] = row
            if isinstance(interval, list) and len(interval) == 2:
                intervals[row["step"]] = interval
    lines = [lines[step] for step in sorted(lines)]
    names = dict.fromkeys(name for row in lines for name in row)
    columns = {"step": np.zeros(0)}
    for name in names:
        columns[name] = np.array([row.get(name) for row in lines], np.float64)
    return Log(columns, intervals, unread)


# --- packed arrays --------------------------------------------------------------------------


def find_packed(run):
    """The Packed arrays that the run was trained on, or None."""
    fingerprint = run.record["inputs"].get("data")
    for folder in runs.places(run.folder, run.record, "data"):
        if not (folder / "meta.json").is_file():
            continue
        try:
            packed = Packed(folder)
        except InputError:
            continue
        if packed.meta["fingerprint"] == fingerprint:
            return packed
    run.missing.append(
        f"The packed arrays in {run.arguments['data']} are gone or hold other data now: there are no texts and no "
        "lengths of responses."
    )
    return None
