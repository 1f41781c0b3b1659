"""The pairs of a run as last scored, from scores.jsonl: their rewards, margins and lengths.

n pairs, S states of a response.
"""

import math
from typing import NamedTuple, Optional

import numpy as np

from reporting import jsonl
from training import runs

MOST_TRAINING_PAIRS = 5000  # read where no pair is held out


class Scored(NamedTuple):
    """n pairs as last scored: those held out, or where there are none the training pairs of the last epoch."""

    is_held_out: bool
    step: int
    pair: np.ndarray  # (n,) place in packed
    line: np.ndarray  # (n,) line of the source
    rewards: np.ndarray  # (n, 2, S) beta * gain (losses.py) by state, of chosen and rejected
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

    @property
    def kind(self):
        return "held-out pairs" if self.is_held_out else "training pairs"

    @property
    def description(self):
        return f"{self.kind} (step {self.step})"


class ScoreRow(NamedTuple):
    """A line of scores.jsonl."""

    step: int
    split: str  # eval or train
    pair: int
    line: int
    gain: np.ndarray  # (2, S) of chosen and rejected, not yet per token


def score_row(text, loss):
    """The ScoreRow of a line, None if it is not one. loss: the row of losses.LOSSES that rewards are shown for."""
    row = jsonl.parsed(text) or {}
    try:
        policy, ref = (np.array(row[name], np.float64) for name in ("policy", "ref"))
        gain = loss.gain(policy, ref, 1)
        found = ScoreRow(int(row["step"]), row.get("split"), int(row["pair"]), int(row["line"]), gain)
    except (KeyError, TypeError, ValueError):
        return None
    return found if found.gain.ndim == 2 and len(found.gain) == 2 else None


def read(run):
    """The Scored of scores.jsonl, or None."""
    evaluated, _ = run.column("eval_loss")
    is_held_out = len(evaluated) > 0
    if is_held_out:
        first_step = last_step = int(evaluated[-1])
    else:
        first_step, last_step = last_epoch(run), run.steps_done
    split = "eval" if is_held_out else "train"
    latest = {}  # {pair: its last ScoreRow}
    for text in jsonl.lines_backwards(runs.Run(run.folder).scores_path):
        row = score_row(text, run.loss)
        if row is None:
            continue
        if row.step < first_step or (len(latest) == MOST_TRAINING_PAIRS and not is_held_out):
            break
        if row.step <= last_step and row.split == split:
            latest.setdefault(row.pair, row)
    rows = list(latest.values())
    rows = [row for row in rows if row.gain.shape == rows[0].gain.shape]
    if not rows:
        run.missing.append(
            "scores.jsonl holds no score of a pair: there are no margins by denoising step or by length, and no list "
            "of pairs."
        )
        return None
    return scored(run, is_held_out, last_step, rows)


def last_epoch(run):
    """The first of the steps that make the last pass over the training pairs."""
    steps, epochs = run.column("epoch")
    if not len(steps) or not epochs[-1]:
        return 1
    steps_an_epoch = max(1, round(steps[-1] / epochs[-1]))
    return run.steps_done + 1 - steps_an_epoch


def scored(run, is_held_out, step, rows):
    """The Scored of ScoreRows."""
    pair, line = np.array([row.pair for row in rows]), np.array([row.line for row in rows])
    rewards = run.arguments["beta"] * np.stack([row.gain for row in rows])  # (n, 2, S)
    tokens = None
    if run.packed and pair.max() < len(run.packed):
        tokens = np.diff(run.packed.bounds[pair, 1:], axis=1)  # (n, 2)
    if run.loss.is_per_token:
        if tokens is None:
            run.missing.append(
                "There are no margins of pairs: rewards of this loss are per token, and the packed arrays are gone."
            )
            return None
        rewards /= tokens[:, :, None]
    good = np.isfinite(rewards).all((1, 2))
    return Scored(
        is_held_out=is_held_out,
        step=step,
        pair=pair[good],
        line=line[good],
        rewards=rewards[good],
        tokens=None if tokens is None else tokens[good],
        unusable=int((~good).sum()),
    )


class Correlation(NamedTuple):
    """Pearson's r with its 95% interval."""

    r: float
    low: float
    high: float


def correlation(x, y):
    """The Correlation of two (n,) arrays, its interval by Fisher's z; None where it has no meaning."""
    if len(x) < 10 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -0.9999999, 0.9999999))
    half = 1.96 / math.sqrt(len(x) - 3)
    return Correlation(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half))
