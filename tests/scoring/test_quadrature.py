"""Tests of scoring/quadrature.py and of the estimator radau: what the rules sum exactly.

bash tests/run.sh tests/scoring/test_quadrature.py
"""

import itertools

import numpy as np
import pytest

from scoring import noise, quadrature
from scoring.noise import generator


class Ranks:
    """Stands for a random generator: the order of its numbers is given."""

    def __init__(self, rank):
        self.rank = np.array(rank)

    def random(self, n):
        return self.rank / n


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 20, 32, 64])
def test_radau_integrates_polynomials(T):
    """The states' weights sum f(l) = l^p over l = 1..n exactly, for p < T: and no weight is below 0."""
    for n in (*range(1, 40), 100, 512):
        masked = noise.state_masks(n, "radau", T, 3, generator(0, [n], "pair"))
        weight, levels = noise.state_weights(masked, "radau", T, 3), masked.sum(1)
        count = len({*levels} - {0})  # less than n and T where the nodes lie close together
        assert (
            masked.shape == (1 + 3 * (T - 1), n)
            and levels[0] == n
            and (count == min(n, T) or min(n, T) > 8 and count > min(n, T) / 2)
        )
        assert weight.dtype == np.float32 and weight.min() >= 0 and not weight[~masked].any()
        for p in range(min(count, 8)):
            found = (weight.sum(1) * (levels / n) ** p).sum()
            assert found == pytest.approx(((np.arange(1, n + 1) / n) ** p).sum(), rel=1e-4)


def test_radau_is_exact_for_short_responses():
    """With as many nodes as tokens, the mean over all orders is the sum over levels, for any log p(token | mask)."""
    for n, T, R in ((2, 2, 3), (4, 4, 2), (3, 5, 1)):
        table = np.random.default_rng(n).normal(size=(2,) * n + (n,))  # of each mask and token
        by_level = [[] for _ in range(n)]  # of the mean log p of what a mask hides
        for mask in itertools.product((0, 1), repeat=n):
            if any(mask):
                by_level[sum(mask) - 1].append(table[mask][np.array(mask, bool)].mean())
        truth, found = sum(map(np.mean, by_level)), []
        for order in itertools.permutations(range(n)):
            masked = noise.state_masks(n, "radau", T, R, Ranks(order))
            logp = np.stack([table[tuple(state.astype(int))] for state in masked])
            found.append((noise.state_weights(masked, "radau", T, R) * logp).sum())
        assert np.mean(found) == pytest.approx(truth, rel=1e-5)


def test_radau_windows_divide_the_tokens():
    """With two nodes and three trajectories each token is hidden twice: with all, and in one of three windows."""
    for n in (12, 30, 33):
        masked = noise.state_masks(n, "radau", 2, 3, generator(0, [n], "pair"))
        assert masked.sum(1).tolist() == [n, n // 3, n // 3, n // 3] and (masked.sum(0) == 2).all()
        np.testing.assert_allclose(noise.state_weights(masked, "radau", 2, 3).sum(0), 1, rtol=1e-5)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_rules_of_a_weighting(power):
    """Gauss's T nodes are exact for polynomials up to degree 2T - 1 but for their rounding, which the shares repair."""
    n = 400
    w = quadrature.weighting(n, power)
    assert w.sum() == pytest.approx(1) and w[n // 2 - 1] / w[-1] == pytest.approx(0.5**power)
    for T in (1, 2, 3):
        nodes = quadrature.gauss_nodes(w, T)
        share, levels = quadrature.shares(w, nodes), np.arange(1, n + 1) / n
        for p in range(2 * T):
            tolerance = 1e-9 if p < T else 5e-3
            assert share @ (nodes / n) ** p == pytest.approx(w @ levels**p, abs=tolerance)
