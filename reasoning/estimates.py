"""Estimates from one or several samples per item, with 95% intervals: pass@k and majority@k. Items are the unit.

pass_at(2, samples=4, right=1)                          0.5: two of the four hold the right one in 3 of 6 draws
votes("number", ["18", "20", None, "18.0"])             [0, 1, None, 0]: the sample whose answer each one repeats
majority([0, 1, None, 0])                               0: the answer of sample 0 has most votes
interval([1.0, 0.5, 0.0])                               [low, high] of the mean
"""

import math
from collections import Counter

import numpy as np

from reasoning import answers, tasks

RESAMPLES = 4000  # of the items, by the bootstrap


def sizes(samples):
    """The k of pass@k for a number of samples: 1, 2, 4, ... below it, then itself."""
    return [2**power for power in range((samples - 1).bit_length())] + [samples]


def pass_at(k, samples, right):
    """The chance that k samples hold a right one, without bias, from `samples` of which `right` are right.

    1 - C(samples - right, k) / C(samples, k)          (Chen et al., arXiv 2107.03374, equation 1)
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def votes(kind, extracted):
    """For each answer the place of the first one that is equal to it, as the reader of their kind compares them.

    kind: a name in answers.KINDS; extracted: texts, None where no answer was read, which casts no vote.
    """
    found, firsts = [], []
    for place, answer in enumerate(extracted):
        if answer is None:
            found.append(None)
            continue
        first = next((first for first in firsts if is_same(kind, answer, extracted[first])), place)
        if first == place:
            firsts.append(place)
        found.append(first)
    return found


def is_same(kind, answer, other):
    return answer == other or answers.KINDS[kind].same(answer, other) is True


def majority(places):
    """The place with most votes, of those with equally many the first; None without any vote. places: votes()'s.

    Samples are exchangeable, so "the first" favours no answer: it is a draw among equals that can be repeated.
    """
    counted = Counter(place for place in places if place is not None)
    return max(counted, key=counted.get, default=None)


def interval(values):
    """The 95% interval [low, high] of the mean of one value per item, between 0 and 1.

    Wilson's where every value is 0 or 1, else the percentiles of the bootstrap.
    """
    if all(value in (0, 1) for value in values):
        return tasks.wilson(sum(values) / len(values), len(values))
    return bootstrap(values)


def bootstrap(values):
    """[low, high]: the 2.5th and 97.5th percentile of the mean over items drawn with replacement, by a fixed seed."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)), dtype=np.int32)
    return np.percentile(values[drawn].mean(axis=1), [2.5, 97.5]).tolist()


def estimate(values):
    """{"value", "ci95"} of one value per item."""
    return {"value": sum(values) / len(values), "ci95": interval(values)}
