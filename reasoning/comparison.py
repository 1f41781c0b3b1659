"""Models' verdicts on the same items, side by side: accuracies with intervals, and McNemar's test.

A line of results.json's table, which summary() makes; reasoning/table.py prints it:

    {"task": "gsm8k", "model": "a-final", "n": 200, "accuracy": 0.8, "ci95": [0.74, 0.85], "unread": 0.01, ...
     "first_model_against_it": {"difference": 0.03, "won": 21, "lost": 15, "p": 0.4}}

With several samples per item, accuracy is pass@1, the mean over them, and McNemar's test is that of the majorities.
"""

import itertools
import os
from pathlib import Path
from typing import NamedTuple

from files import InputError
from reasoning import benchmarks, estimates


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


# --- McNemar's test ---------------------------------------------------------------------------------------


def mcnemar(won, lost):
    """Two-sided p of McNemar's exact test (1947): the first model alone has `won` items right, the other `lost`."""
    return next(itertools.islice(chances(won + lost), min(won, lost), None))


def chances(changed):
    """Yields mcnemar() of `changed` items that change sides, for lost = 0, 1, 2, ..., half of them."""
    ways, fewer = 1, 0  # C(changed, lost), and its sum over lost and below
    for lost in range(changed // 2 + 1):
        fewer += ways
        yield min(1.0, 2 * fewer / 2**changed)
        ways = ways * (changed - lost) // (lost + 1)


SIGNIFICANT = 0.05  # p of McNemar's test below which a gain is said to show
CHANGED = 0.15  # share of items that change sides, where nothing was measured yet


class Gain(NamedTuple):
    """The least uneven split of the items that change sides that McNemar's test tells from chance."""

    won: int
    lost: int
    p: float


def least_gain(changed):
    """The Gain of `changed` items, each solved by exactly one of two models; None: no split of them has p < 0.05."""
    significant = list(itertools.takewhile(lambda p: p < SIGNIFICANT, chances(changed)))
    lost = len(significant) - 1
    return Gain(changed - lost, lost, significant[-1]) if significant else None


def gain_line(items, changed):
    """A sentence: how large a gain `items` items can show where `changed` of them change sides."""
    where = f"with {items} items of which {changed / items:.0%} change sides ({changed})"
    gain = least_gain(changed)
    if gain is None:
        return f"{where}, no gain gives p < {SIGNIFICANT}: take more items"
    points = 100 * (gain.won - gain.lost) / items
    return f"{where}, {gain.won} to {gain.lost} (+{points:.1f} points) is the least gain that gives p < {SIGNIFICANT}"


def gain_line_of_share(items, share=CHANGED):
    """gain_line() where a share of the items changes sides."""
    return gain_line(items, round(share * items))


# --- the table --------------------------------------------------------------------------------------------


def grouped(rows):
    """[[the rows of an item's samples]] of rows in the order of their items."""
    items = {}
    for row in rows:
        items.setdefault(row["id"], []).append(row)
    return list(items.values())


def solved(item):
    """The share of an item's samples that are right."""
    return sum(row["correct"] is True for row in item) / len(item)


def is_solved(item):
    """The verdict on an item: of its one response, or of the answer that most of its samples give."""
    place = 0 if len(item) == 1 else estimates.majority([row["vote"] for row in item])
    return place is not None and item[place]["correct"] is True


def summary(task, label, rows, first):
    """A line of the table: an item counts as solved or not; "unread" is the share without a readable answer.

    rows: one per sample of each item. first: the first model's, of the same items in the same order; None: these are
    its own.
    """
    items = grouped(rows)
    line = {"task": task, "model": label, "n": len(items)}
    if not items:
        return line
    line |= accuracy_of(items) | {"unread": sum(row["correct"] is None for row in rows) / len(rows)}
    for name in ("ended", "tokens", "f1", "cells", "lm_eval", "by_protocol"):
        if name in rows[0]:
            line[name] = sum(row[name] for row in rows) / len(rows)
    if len(items[0]) > 1:
        line |= estimates_of(items)
    if by := {name: parts(items, name) for name in benchmarks.GROUPS if name in rows[0]}:
        line["by"] = by
    if first is not None:
        line["first_model_against_it"] = against(grouped(first), items)
    return line


def accuracy_of(items):
    values = [solved(item) for item in items]
    return {"accuracy": sum(values) / len(values), "ci95": estimates.interval(values)}


def estimates_of(items):
    """pass@k for every k and majority@k, with their intervals, of items with several samples each."""
    samples = len(items[0])
    right = [sum(row["correct"] is True for row in item) for item in items]
    pass_at = {
        str(k): estimates.estimate([estimates.pass_at(k, samples, count) for count in right])
        for k in estimates.sizes(samples)
    }
    majority = estimates.estimate([int(is_solved(item)) for item in items])
    return {"samples": samples, "pass_at": pass_at, "majority": majority}


def parts(items, name):
    """{value of the field `name`: {"n", "accuracy", "ci95"}}, of a level or a subject."""
    values = sorted({item[0][name] for item in items})
    found = {value: [item for item in items if item[0][name] == value] for value in values}
    return {str(value): {"n": len(part)} | accuracy_of(part) for value, part in found.items()}


def paired(ours, theirs):
    """{"won", "lost", "p"} of McNemar's test of two models' verdicts, bool, on the same items."""
    pairs = list(zip(ours, theirs, strict=True))
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    return {"won": won, "lost": lost, "p": mcnemar(won, lost)}


def against(first, items):
    """McNemar's test of the first model's verdicts against another's; with several samples, the gain in pass@1, too."""
    test = paired(list(map(is_solved, first)), list(map(is_solved, items)))
    test = {"difference": (test["won"] - test["lost"]) / len(items)} | test
    if len(items[0]) > 1:
        gains = [solved(ours) - solved(theirs) for ours, theirs in zip(first, items)]
        test["pass@1"] = {"value": sum(gains) / len(gains), "ci95": estimates.bootstrap(gains)}
    return test
