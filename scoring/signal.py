"""How much of a pair's gradient other pairs agree with, by estimator of the score, and at which noise levels.

g is the gradient of S(chosen) - S(rejected) of one pair under one draw. DPO's first steps go along its mean over pairs.
With E the mean over pairs and draws,

    own = E |g|^2 = |E g|^2 + between pairs + noise            signal = |E g|^2 / own

|E g|^2 is the mean product of the gradients of two different pairs, which their noise does not bias. Standard errors
are the jackknife's over pairs (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 11).

P pairs, D draws, K numbers of a gradient, B bins of noise levels, S states, n response tokens.
"""

from typing import NamedTuple

import numpy as np

BINS = 8  # of noise levels: bin b holds b / BINS < hidden share <= (b + 1) / BINS


class Estimate(NamedTuple):
    """A number (...), and what it is without each pair, (P, ...)."""

    value: np.ndarray
    without: np.ndarray

    @property
    def error(self):
        """The standard error."""
        return spread(self.without)

    def over(self, other):
        """The ratio of two Estimates."""
        return Estimate(self.value / other.value, self.without / other.without)


def spread(without):
    """The standard error of a number that is `without` (P, ...) each pair."""
    return np.sqrt((len(without) - 1) * np.var(without, axis=0))


def mean(values):
    """The Estimate of the mean over pairs of values (P,)."""
    return Estimate(values.mean(), (values.sum() - values) / (len(values) - 1))


def across(products):
    """The Estimate of the mean over pairs p != q of products (P, P, ...)."""
    P = len(products)
    products = products.copy()
    products[np.arange(P), np.arange(P)] = 0
    total = products.sum((0, 1))
    return Estimate(total / (P * (P - 1)), (total - products.sum(0) - products.sum(1)) / ((P - 1) * (P - 2)))


def measure(gradients, truth):
    """What a design's gradients (P, D, K) hold, of P >= 3 and D >= 2, beside those of every level, truth (P, K).

    signal, between, noise: shares of a gradient's own square, which add up to 1. bias: the square of what the mean
    gradient has too much or too little, as a share of the square of the true mean gradient. Returns a dictionary of
    plain numbers, with `without`: the signal without each pair, from which two designs are compared.
    """
    gradients, truth = gradients.astype(np.float64), truth.astype(np.float64)
    by_pair = gradients.mean(1)  # (P, K)
    noise = ((gradients - by_pair[:, None]) ** 2).sum(-1).sum(-1) / (gradients.shape[1] - 1)  # (P,)
    own = mean((gradients**2).sum(-1).mean(-1))
    signal, noise = across(by_pair @ by_pair.T).over(own), mean(noise).over(own)
    wrong = by_pair - truth
    bias = across(wrong @ wrong.T).over(across(truth @ truth.T))
    return {
        "signal": float(signal.value),
        "signal_error": float(signal.error),
        "noise": float(noise.value),
        "between": float(1 - signal.value - noise.value),
        "bias": float(bias.value),
        "bias_error": float(bias.error),
        "without": signal.without.tolist(),
    }


def shares(by_level):
    """The Estimate (B,) of how much of |E g|^2 comes from each bin of levels: by_level (P, B, K), whose sum is g."""
    by_level = by_level.astype(np.float64)
    products = by_level @ by_level.sum(1).T  # (P, B, P)
    found = across(products.swapaxes(1, 2))
    total = Estimate(found.value.sum(), found.without.sum(1, keepdims=True))
    return found.over(total)


def level_bins(masked, block=None, fixed=None):
    """(S, n) int: the bin of each token's noise level in each state of masked (S, n), 0 if nothing is hidden.

    The level is the hidden share of the response; of a block-causal model that of the token's block. block, fixed (n,):
    as in scoring/noise.py.
    """
    n = masked.shape[1]
    index = np.zeros(n, int) if block is None else np.unique(block, return_inverse=True)[1]
    size = np.bincount(index, np.ones(n) if fixed is None else ~fixed)[index]  # (n,) tokens that can be hidden
    hidden = np.stack([np.bincount(index, state)[index] for state in masked])  # (S, n)
    return np.maximum(np.ceil(BINS * hidden / np.maximum(size, 1)).astype(int) - 1, 0)
