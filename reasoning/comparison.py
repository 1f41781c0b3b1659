"""Several models' verdicts on the same items, side by side: accuracies with intervals, and McNemar's test."""

import math
import os
from pathlib import Path
from typing import NamedTuple

from files import InputError
from reasoning import tasks


def labels(models):
    """{model: a short name, for files}: the last two parts of its path, more where two names would be the same."""
    parts = [Path(os.path.abspath(model) if os.path.isdir(model) else model).parts for model in models]
    for model, each in zip(models, parts):
        if parts.count(each) > 1:
            raise InputError(f"--compare: {model} is there twice; expected different models")
    names = [last_parts(each, 2) for each in parts]
    for count in range(3, max(map(len, parts)) + 1):
        names = [name if names.count(name) == 1 else last_parts(each, count) for name, each in zip(names, parts)]
    names = [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names, 1)]
    return dict(zip(models, names))


def last_parts(parts, count):
    """("x", "a", "final"), 2 -> "a-final"."""
    return "-".join(parts[-count:]).lstrip("/-")


def mcnemar(won, lost):
    """Two-sided p of McNemar's exact test (1947): the first model alone has `won` items right, the other `lost`."""
    n = won + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n)


SIGNIFICANT = 0.05  # p of McNemar's test below which a gain is said to show
CHANGED = 0.15  # share of items that change sides, where nothing was measured yet


class Gain(NamedTuple):
    """The least uneven split of the items that change sides that McNemar's test tells from chance."""

    won: int
    lost: int
    p: float


def least_gain(changed):
    """The Gain of `changed` items, each solved by exactly one of two models; None: no split of them has p < 0.05."""
    for lost in range(changed // 2, -1, -1):
        won = changed - lost
        if (p := mcnemar(won, lost)) < SIGNIFICANT:
            return Gain(won, lost, p)
    return None


def gain_line(items, changed):
    """A sentence: how large a gain `items` items can show where `changed` of them change sides."""
    where = f"with {items} items of which {changed / items:.0%} change sides ({changed})"
    gain = least_gain(changed)
    if gain is None:
        return f"{where}, no gain gives p < {SIGNIFICANT}: take more items"
    points = 100 * (gain.won - gain.lost) / items
    return f"{where}, {gain.won} to {gain.lost} (+{points:.1f} points) is the least gain that gives p < {SIGNIFICANT}"


def against(first, rows):
    """McNemar's test of the first model's rows against another's, the same items in the same order."""
    pairs = [(a["correct"] is True, b["correct"] is True) for a, b in zip(first, rows)]
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    return {"difference": (won - lost) / len(rows), "won": won, "lost": lost, "p": mcnemar(won, lost)}


def summary(task, label, rows, first):
    """A line of the table: an item counts as solved or not; "unread" is the share without a readable answer.

    first: the first model's rows, the same items in the same order; None: these are its own.
    """
    n = len(rows)
    line = {"task": task, "model": label, "n": n}
    if not n:
        return line
    accuracy = sum(row["correct"] is True for row in rows) / n
    unread = sum(row["correct"] is None for row in rows) / n
    line |= {"accuracy": accuracy, "ci95": tasks.wilson(accuracy, n), "unread": unread}
    for name in ("ended", "tokens", "f1", "cells", "lm_eval"):
        if name in rows[0]:
            line[name] = sum(row[name] for row in rows) / n
    if first is not None:
        line["first_model_against_it"] = against(first, rows)
    return line


def print_table(table):
    """Print lines that summary() made."""
    task_width = max(len(line["task"]) for line in table)
    model_width = max(len(line["model"]) for line in table)
    print(
        f"{'task':{task_width}}  {'model':{model_width}}     n  accuracy  95% interval  unread  ended  tokens  "
        "first model against it"
    )
    for line in table:
        text = f"{line['task']:{task_width}}  {line['model']:{model_width}} {line['n']:5d}"
        if line["n"]:
            low, high = line["ci95"]
            text += f"{line['accuracy']:10.3f}  {abs(low):5.3f}-{high:5.3f} {line['unread']:8.0%}"
            text += f" {line['ended']:7.0%} {line['tokens']:7.1f}" if "ended" in line else " " * 16
        if "f1" in line:
            text += f"  F1 {line['f1']:.3f}"
        if "cells" in line:
            text += f"  cells {line['cells']:.3f}"
        if "lm_eval" in line:
            text += f"  lm_eval's filter {line['lm_eval']:.3f}"
        if test := line.get("first_model_against_it"):
            text += f"  {test['difference']:+.3f} ({test['won']} won, {test['lost']} lost, p = {test['p']:.2g})"
        print(text)
