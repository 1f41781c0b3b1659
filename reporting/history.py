"""What a run's folder tells of it, as report.py shows it: the log, the pairs as last scored, the texts, evaluations.

    runs/NAME/ (run.json, log.jsonl, scores.jsonl, skipped.jsonl), packed/, results.json of evaluate.py -> History

A run may be going on, killed, or moved: torn lines are left out and counted, and what is gone is named in `missing`.
S states of a response.
"""

import fcntl
import json
import math
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from files import InputError, read_json, read_sealed
from preferences.packed import Packed
from training import runs

PAIRS = 5000  # training pairs read from scores.jsonl, at most, where no pair is held out


class Scored(NamedTuple):
    """n pairs as last scored: those held out, or where there are none the training pairs of the last epoch."""

    held: bool
    step: int
    pair: np.ndarray  # (n,) place in packed
    line: np.ndarray  # (n,) line of the source
    rewards: np.ndarray  # (n, 2, S) beta * (policy - reference) by state, of chosen and rejected
    tokens: Optional[np.ndarray]  # (n, 2) of the responses, if the packed arrays are there
    unusable: int  # pairs without a finite score

    @property
    def margin(self):
        """(n,) reward of chosen - reward of rejected."""
        return np.subtract(*self.rewards.sum(-1).T)

    @property
    def longer(self):
        """(n,) tokens by which chosen is longer than rejected."""
        return np.subtract(*self.tokens.T)


@dataclass
class History:
    folder: Path
    name: str
    record: dict
    log: dict  # {column: (steps,) float64, nan where there is none}
    intervals: dict  # {step: [low, high]} of the held-out accuracy
    unread: int  # lines of log.jsonl that are none
    state: str  # finished, running or stopped
    packed: Optional[Packed] = None
    scored: Optional[Scored] = None
    skipped: list = field(default_factory=list)
    missing: list = field(default_factory=list)  # sentences: what cannot be shown, and why
    tokenizer: Any = None

    @property
    def arguments(self):
        return self.record["arguments"]

    @property
    def sft(self):
        return self.arguments["loss_type"] == "sft"

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
    def done(self):
        return int(self.log["step"][-1]) if len(self.log["step"]) else 0

    @property
    def per_step(self):
        """Pairs of an optimizer step, of all ranks."""
        return math.prod(
            self.arguments[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "ranks")
        )


# --- the folder -------------------------------------------------------------------------------------------


def read(folder):
    """The History of a run's folder; InputError if it is none."""
    folder = Path(folder)
    run = runs.Run(folder)
    if not (folder / "run.json").is_file():
        raise InputError(
            f"{folder}: holds no run.json; expected the --output_dir of a run that has begun, such as runs/tiny (train with "
            "bash launch.sh)"
        )
    record = read_sealed(folder / "run.json", "training again")
    log, intervals, unread = read_log(run.log_path)
    state = "finished" if run.finished else "running" if held_by_other(folder / ".lock") else "stopped"
    found = History(folder, runs.without_home(os.path.normpath(folder)), record, log, intervals, unread, state)
    found.packed = find_packed(found)
    if not found.sft:
        found.scored = read_scores(found)
        if found.arguments["estimator"] == "elbo":
            found.missing.append(
                "No margin by denoising step: the levels of elbo are drawn at random and belong to no step."
            )
    found.skipped = list(rows_of(run.skipped_path))
    return found


def held_by_other(path):
    """Whether a process of this machine has locked `path`. A shared lock, let go at once: it stands in nobody's way."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def parsed(line):
    """The JSON object of a line, None if it is none: a process that was killed leaves half a line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def rows_of(path):
    """The JSON objects of a .jsonl file's lines; none if it is not there."""
    if path.is_file():
        with open(path, "rb") as file:
            yield from (row for row in map(parsed, file) if row is not None)


def read_log(path):
    """({column: (steps,) values}, {step: interval of the held-out accuracy}, lines that are none) of log.jsonl."""
    lines, intervals, unread = {}, {}, 0
    with open(path, "rb") if path.is_file() else open(os.devnull, "rb") as file:
        for text in file:
            row = parsed(text)
            interval = row.pop("eval_rewards/accuracies_ci95", None) if row else None
            plain = row and all(value is None or isinstance(value, (int, float)) for value in row.values())
            if not plain or type(row.get("step")) is not int:
                unread += 1
                continue
            lines[row["step"]] = row
            if isinstance(interval, list) and len(interval) == 2:
                intervals[row["step"]] = interval
    lines = [lines[step] for step in sorted(lines)]
    names = dict.fromkeys(name for row in lines for name in row)
    log = {name: np.array([row.get(name) for row in lines], np.float64) for name in names}
    return {"step": np.zeros(0)} | log, intervals, unread


# --- packed arrays, scored pairs --------------------------------------------------------------------------


def find_packed(run):
    """The Packed arrays that the run was trained on, or None."""
    wanted = run.record["inputs"].get("data")
    for folder in runs.places(run.folder, run.record, "data"):
        try:
            if (folder / "meta.json").is_file() and (packed := Packed(folder)).meta["fingerprint"] == wanted:
                return packed
        except InputError:
            continue
    run.missing.append(
        f"The packed arrays, {run.arguments['data']}, are gone or hold other data now: no texts, and no lengths of responses."
    )
    return None


def backwards(path):
    """The lines of a file, as bytes, the last first: what is asked for stands near its end."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            end = len(view)
            while end > 0:
                start = view.rfind(b"\n", 0, end) + 1
                yield view[start:end]
                end = start - 1


def read_scores(run):
    """The Scored of scores.jsonl, or None."""
    held, (evaluated, _) = True, run.column("eval_loss")
    if len(evaluated):
        first = last = int(evaluated[-1])
    else:
        held, last, (steps, epochs) = False, run.done, run.column("epoch")
        first = last + 1 - max(1, round(steps[-1] / epochs[-1])) if len(steps) and epochs[-1] else 1
    found = {}
    for line in backwards(runs.Run(run.folder).scores_path):
        row = parsed(line) or {}
        try:
            step, pair, place = (int(row[name]) for name in ("step", "pair", "line"))
            scores = np.subtract(*(np.array(row[name], np.float64) for name in ("policy", "ref")))  # (2, S)
        except (KeyError, TypeError, ValueError):
            continue
        if step < first or len(found) == PAIRS and not held:
            break
        if step <= last and row.get("split") == ("eval" if held else "train") and scores.ndim == 2 and len(scores) == 2:
            found.setdefault(pair, (place, scores))
    shapes = [scores.shape for _, scores in found.values()]
    found = {pair: each for pair, each in found.items() if each[1].shape == shapes[0]}
    if not found:
        run.missing.append(
            "There is no score of a pair in scores.jsonl: no margins by denoising step or by length, and no list of pairs."
        )
        return None
    return scored(run, held, last, found)


def scored(run, held, step, found):
    """Scored of {pair: (line, policy - reference (2, S))}."""
    pair, line = np.array(list(found)), np.array([place for place, _ in found.values()])
    rewards = run.arguments["beta"] * np.stack([scores for _, scores in found.values()])
    tokens = None
    if run.packed and pair.max() < len(run.packed):
        tokens = np.diff(run.packed.bounds[pair, 1:], axis=1)
        if run.arguments["loss_type"] == "ipo":  # whose rewards are per token
            rewards /= tokens[:, :, None]
    elif run.arguments["loss_type"] == "ipo":
        run.missing.append("Rewards of ipo are per token, and the packed arrays are gone: no margins of pairs.")
        return None
    good = np.isfinite(rewards).all((1, 2))
    return Scored(
        held, step, pair[good], line[good], rewards[good], None if tokens is None else tokens[good], int((~good).sum())
    )


def correlation(x, y):
    """(r, low, high): Pearson's correlation and its 95% interval by Fisher's z; None where it has no meaning."""
    if len(x) < 10 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -0.9999999, 0.9999999))
    half = 1.96 / math.sqrt(len(x) - 3)
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


# --- texts, evaluations -----------------------------------------------------------------------------------


def load_tokenizer(run):
    """Set run.tokenizer to the one that packed the arrays: of final/, or of the model that the run began with. Nothing is downloaded."""
    from models import tokenization  # imported here: torch and transformers take longer than the rest of the report

    source = run.packed.meta["model_name_or_path"]
    for name in (run.folder / "final", *runs.places(run.folder, run.record, "model_name_or_path"), source):
        folder = local(str(name))
        if folder and (Path(folder) / "adapter_config.json").is_file():
            continue  # its tokenizer asks for its base's config, which might be fetched
        try:
            tokenizer = tokenization.load_tokenizer(folder)
        except InputError:
            continue
        if tokenization.tokenizer_fingerprint(tokenizer) == run.packed.meta["tokenizer"]:
            run.tokenizer = tokenizer
            return
    run.missing.append(f"The tokenizer of {source} is not here: the pairs' texts cannot be read.")


def local(name):
    """The folder of a model that is on this machine: `name` itself, or what the hub's cache has of it; None if there is none."""
    from huggingface_hub import snapshot_download

    try:
        return name if os.path.isdir(name) else snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):  # not in the cache; not a name of the hub
        return None


def texts(run, pair):
    """(prompt, chosen, rejected) of a pair."""
    return [run.tokenizer.decode(ids) for ids in run.packed[pair]]


class Evaluation(NamedTuple):
    path: Path  # results.json
    table: list  # its lines
    answers: dict  # {task: {item: {model: row}}}


def evaluations(run, given):
    """What evaluate.py wrote of the run's final/: in `given`, else in folders beside the run or in it."""
    if given:
        return [read_evaluation(Path(given) / "results.json")]
    near = {*run.folder.resolve().parent.glob("*/results.json"), *run.folder.resolve().glob("**/results.json")}
    final, found = (run.folder / "final").resolve(), []
    for path in sorted(near):
        try:
            models = [model["path"] for model in read_json(path, "evaluate.py")["models"].values()]
        except (InputError, KeyError, TypeError, AttributeError):
            continue
        moved = [run.folder / os.path.relpath(model, run.arguments["output_dir"]) for model in models]
        if final in [Path(model).resolve() for model in (*models, *moved)]:
            found.append(read_evaluation(path))
    return found


def read_evaluation(path):
    results = read_json(path, "python evaluate.py --model runs/NAME/final --output_dir FOLDER")
    table, files = results.get("table"), results.get("files")
    if (
        not isinstance(table, list)
        or not isinstance(files, list)
        or not all(
            isinstance(line, dict)
            and {"task", "model", "n", "file"} <= line.keys()
            and ("accuracy" in line or not line["n"])
            for line in table
        )
    ):
        raise InputError(f"{path}: not what evaluate.py writes; give --evaluation the --output_dir of evaluate.py")
    answers = {}
    for line in results["table"]:
        name = line["file"]
        for row in rows_of(path.parent / name) if name in results["files"] else ():
            if {"id", "prompt", "response", "correct"} <= row.keys() and isinstance(row["id"], (str, int)):
                answers.setdefault(line["task"], {}).setdefault(row["id"], {})[line["model"]] = row
    return Evaluation(path, results["table"], answers)
