"""Tests of scoring/noise.py against this file's own loops and numbers worked out by hand.

bash tests/run.sh tests/scoring/test_noise.py
"""

import itertools

import numpy as np
import pytest

from scoring import noise, sft_noise
from scoring.noise import generator, trajectories, trajectory_masks, trajectory_weights

GRID = list(itertools.product((1, 2, 3, 4, 7, 20), (1, 2, 3, 5)))  # T, R


class Ranks:
    """Stands for a random generator: the order of its numbers is given."""

    def __init__(self, rank):
        self.rank = np.array(rank)

    def random(self, n):
        assert n == len(self.rank)
        return self.rank / n


def naive_reveal_step(rank, T, R):
    """Step s reveals the ranks n*s//T .. n*(s+1)//T - 1; trajectory r adds r*n//R to every rank, modulo n."""
    n = len(rank)
    table = [[None] * n for _ in range(R)]
    for r in range(R):
        for i in range(n):
            k = (rank[i] + r * n // R) % n
            for s in range(T):
                if n * s // T <= k < n * (s + 1) // T:
                    assert table[r][i] is None
                    table[r][i] = s
    return table


def naive_masks(reveal_step, T):
    """State 0 is all masks; then trajectory by trajectory, before steps 1 .. T-1."""
    masks = [[True] * len(reveal_step[0])]
    for reveal in reveal_step:
        for s in range(1, T):
            masks.append([step >= s for step in reveal])
    return masks


def naive_weights(reveal_step, T):
    """(Trajectories that reveal the token from this state) / R; state 0 is every trajectory's first."""
    R, n = len(reveal_step), len(reveal_step[0])
    weight = [[0.0] * n for _ in range(1 + R * (T - 1))]
    for r in range(R):
        for i in range(n):
            s = reveal_step[r][i]
            weight[0 if s == 0 else 1 + r * (T - 1) + s - 1][i] += 1 / R
    return weight


def test_example_by_hand():
    """5 tokens, T = 3 (ranks 0 | 1 2 | 3 4), R = 2 (the second trajectory adds 2 to every rank)."""
    reveal_step = trajectories(5, 3, 2, Ranks([3, 0, 4, 1, 2]))
    assert reveal_step.tolist() == [[2, 0, 2, 1, 1], [0, 1, 1, 2, 2]]
    masked = trajectory_masks(reveal_step, 3)
    assert masked.dtype == bool and masked.astype(int).tolist() == [
        [1, 1, 1, 1, 1],
        [1, 0, 1, 1, 1],
        [1, 0, 1, 0, 0],
        [0, 1, 1, 1, 1],
        [0, 0, 0, 1, 1],
    ]
    weight = trajectory_weights(masked, 3, 2)
    assert weight.dtype == np.float32 and weight.tolist() == [
        [0.5, 0.5, 0, 0, 0],
        [0, 0, 0, 0.5, 0.5],
        [0.5, 0, 0.5, 0, 0],
        [0, 0.5, 0.5, 0, 0],
        [0, 0, 0, 0.5, 0.5],
    ]


@pytest.mark.parametrize("T, R", GRID)
def test_against_loops(T, R):
    for n in range(1, 51):
        rank = np.random.default_rng(n).permutation(n)
        reveal_step = trajectories(n, T, R, Ranks(rank))
        naive = naive_reveal_step(rank.tolist(), T, R)
        assert reveal_step.tolist() == naive  # every entry of the loop is one step: each token is revealed once
        sizes = np.stack([np.bincount(row, minlength=T) for row in reveal_step])
        assert sizes.shape == (R, T) and sizes.sum() == R * n and np.ptp(sizes) <= 1
        masked = trajectory_masks(reveal_step, T)
        assert masked.shape == (noise.state_count("stepwise", T, R), n) == (1 + R * (T - 1), n)
        assert masked.tolist() == naive_masks(naive, T)
        for path in masked[1:].reshape(R, T - 1, n):
            assert (np.diff(path.astype(int), axis=0) <= 0).all()  # nested: what is shown stays shown
        weight = trajectory_weights(masked, T, R)
        np.testing.assert_allclose(weight, naive_weights(naive, T), atol=1e-6)
        np.testing.assert_allclose(weight.sum(0), 1, atol=1e-6)
        assert not weight[~masked].any()


def step_of(k, n, T):
    """The step that reveals the k-th of n tokens."""
    return max(s for s in range(T) if n * s // T <= k)


@pytest.mark.parametrize("b", [1, 3, 8, 50])
@pytest.mark.parametrize("T, R", GRID)
def test_blocks(T, R, b):
    """Blocks from left to right, each by the rule of a whole response: its ranks shift inside it."""
    for n in (1, 2, 7, 16, 23):
        rank = np.random.default_rng(n).permutation(n).tolist()
        place = [[None] * n for _ in range(R)]  # each token's place in the order of revealing
        for r in range(R):
            for first in range(0, n, b):
                tokens = list(range(first, min(first + b, n)))
                for k, i in enumerate(sorted(tokens, key=lambda i: rank[i])):
                    place[r][i] = first + (k + r * len(tokens) // R) % len(tokens)
        reveal_step = trajectories(n, T, R, Ranks(rank), b)
        for steps, row in zip(reveal_step.tolist(), place):
            assert steps == [step_of(k, n, T) for k in row]
        blocks = [reveal_step[:, first : first + b] for first in range(0, n, b)]
        assert all(left.max() <= right.min() for left, right in zip(blocks, blocks[1:]))
        weight = trajectory_weights(trajectory_masks(reveal_step, T), T, R)
        np.testing.assert_allclose(weight.sum(0), 1, atol=1e-6)
    for n in (1, 5, 8):  # one block is random order
        one_block, random_order = (trajectories(n, T, R, generator(0, [n], "chosen"), size) for size in (8, None))
        assert (one_block == random_order).all()


@pytest.mark.parametrize("R", [1, 4])
def test_one_step(R):
    """T = 1: the all-masked state alone, every token from there."""
    masked = trajectory_masks(trajectories(6, 1, R, generator(0, [1], "chosen")), 1)
    assert masked.tolist() == [[True] * 6] and trajectory_weights(masked, 1, R).tolist() == [[1.0] * 6]


def test_one_trajectory_reveals_all_one_by_one():
    """T = n, R = 1: n states, each hides one token less and scores that token."""
    masked = trajectory_masks(trajectories(6, 6, 1, generator(0, [1], "chosen")), 6)
    assert masked.sum(1).tolist() == [6, 5, 4, 3, 2, 1]
    weight = trajectory_weights(masked, 6, 1)
    assert weight.sum(0).tolist() == weight.sum(1).tolist() == [1.0] * 6
    assert (weight[:-1] == (masked[:-1] & ~masked[1:])).all() and (weight[-1] == masked[-1]).all()


def test_order_is_uniform():
    counts = np.zeros((4, 4))
    for key in range(2000):
        counts[np.arange(4), trajectories(4, 4, 1, generator(0, [key], "chosen"))[0]] += 1
    np.testing.assert_allclose(counts, 500, atol=5 * np.sqrt(2000 * 3 / 16))  # 5 sigma


@pytest.mark.parametrize(
    "states, T, R",
    [([[1, 1], [1, 0], [0, 1]], 3, 1), ([[1, 0], [0, 0]], 2, 1), ([[1, 1], [1, 0]], 3, 1), ([[1, 1], [1, 0]], 2, 2)],
)
def test_not_trajectories(states, T, R):
    """Hidden again; shown in the first state; too few states."""
    with pytest.raises(ValueError, match="trajectories"):
        trajectory_weights(np.array(states, bool), T, R)


def test_a_pair_shares_its_noise():
    """By the same numbers, tokens at the same places stand in the same order, whatever comes after."""
    for n, m in ((40, 40), (40, 31), (7, 30)):
        one, other = (trajectories(length, length, 1, generator(0, [1], "pair"))[0] for length in (n, m))
        both = min(n, m)
        assert (np.argsort(one[:both]) == np.argsort(other[:both])).all()
    for estimator in ("spread", "stepwise"):
        assert [noise.side_of(estimator, side) for side in (0, 1)] == ["pair", "pair"]
    sides = [noise.side_of("elbo_stratified", side) for side in (0, 1)]
    assert sides == ["chosen", "rejected"]  # VRPO's are independent


# --- what is spread, what is drawn by levels, which states carry the gradient -------------------------------


@pytest.mark.parametrize("T, R", GRID)
def test_spread(T, R):
    """A state's weights sum to what it reveals, (tokens revealed from it) / R, alike on all that it hides."""
    for n in (1, 2, 5, 12, 33):
        masked = noise.state_masks(n, "spread", T, R, generator(0, [n], "chosen"))
        got, revealed = noise.state_weights(masked, "spread", T, R), np.array(trajectory_weights(masked, T, R))
        assert got.dtype == np.float32 and not got[~masked].any()
        for weights, reveals, hides in zip(got, revealed, masked):
            assert np.allclose(weights[hides], reveals.sum() / max(hides.sum(), 1), rtol=1e-5)
        assert got.sum() == pytest.approx(n, rel=1e-5)


def test_spread_has_the_mean_of_stepwise():
    """Over all orders of 4 tokens, any log p(token | mask): the mean of both is the same sum."""
    T, R, n = 3, 2, 4
    table = np.random.default_rng(0).normal(size=(2,) * n + (n,))  # of each mask and token
    totals = {"spread": 0.0, "stepwise": 0.0}
    for order in itertools.permutations(range(n)):
        masked = trajectory_masks(trajectories(n, T, R, Ranks(order)), T)
        logp = np.stack([table[tuple(state.astype(int))] for state in masked])
        for name in totals:
            totals[name] += (noise.state_weights(masked, name, T, R) * logp).sum() / 24
    assert totals["spread"] == pytest.approx(totals["stepwise"], rel=1e-5)


@pytest.mark.parametrize("estimator", ["elbo", "elbo_stratified"])
@pytest.mark.parametrize("n, N, R", [(1, 4, 1), (7, 4, 3), (20, 5, 1), (3, 8, 2)])
def test_elbo(estimator, n, N, R):
    """Each hidden token counts n/l / (N R); levels are of 1..n, stratified one of each N-th; masks favour no token."""
    levels, hidden = [], np.zeros(n)
    for key in range(400):
        masked = noise.state_masks(n, estimator, N, R, generator(0, [key], "chosen"))
        assert masked.shape == (noise.state_count(estimator, N, R), n) == (N * R, n)
        level = masked.sum(1)
        weight = noise.state_weights(masked, estimator, N, R)
        assert weight.dtype == np.float32
        np.testing.assert_allclose(weight, masked * (n / level / (N * R))[:, None], rtol=1e-6)
        by_level = level.reshape(N, R)
        assert (by_level == by_level[:, :1]).all()  # R masks of each
        if estimator == "elbo_stratified":
            assert all(int(i * n / N) < l <= np.ceil((i + 1) * n / N) for i, l in enumerate(by_level[:, 0]))
        levels.extend(by_level[:, 0])
        hidden += masked.sum(0)
    assert min(levels) == 1 and max(levels) == n
    share = np.bincount(levels, minlength=n + 1)[1:] / len(levels)
    np.testing.assert_allclose(share, 1 / n, atol=5 * np.sqrt(1 / n / len(levels)))  # uniform, 5 sigma
    np.testing.assert_allclose(hidden / hidden.sum(), 1 / n, atol=0.25 / n)


@pytest.mark.parametrize("estimator, T, R", [("spread", 4, 5), ("stepwise", 20, 1), ("spread", 3, 2), ("elbo", 8, 1)])
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_gradient_states(estimator, T, R, n):
    """The mean factor of every state with weight is 1, of the others 0; k of them, or all if no more have weight."""
    rng = generator(0, [n], "chosen")
    masked = noise.state_masks(n, estimator, T, R, rng)
    weight = noise.state_weights(masked, estimator, T, R)
    live = weight.any(1)
    for k in {1, 2, min(5, len(masked)), len(masked)}:
        factors = np.stack([noise.gradient_states(masked, weight, k, rng) for _ in range(4000)])
        taken = np.count_nonzero(factors, axis=1)
        assert (taken == min(k, live.sum())).all() and factors.dtype == np.float32 and (factors >= 0).all()
        assert not factors[:, ~live].any()
        chance = (factors > 0).mean(0)
        spread = np.sqrt(np.maximum(1 / np.maximum(chance, 1e-9) - 1, 0) / len(factors))  # of a mean factor
        assert (np.abs(factors.mean(0) - live)[live] <= 5 * spread[live] + 1e-5).all()


def test_gradient_states_spread_along_the_trajectory():
    """Of 8 states of like weight 4 are drawn: one of every two neighbours by number of masks."""
    masked = trajectory_masks(trajectories(8, 8, 1, generator(0, [1], "chosen")), 8)
    for key in range(50):
        rng = generator(key, [1], "chosen gradient")
        factor = noise.gradient_states(masked, trajectory_weights(masked, 8, 1), 4, rng)
        assert (factor.reshape(4, 2) > 0).sum(1).tolist() == [1] * 4 and set(factor) == {0, 2}


# --- where the numbers come from --------------------------------------------------------------------------


def test_noise_never_changes():
    """Numbers that this code has always drawn: other ones would silently change every run."""
    assert trajectories(8, 4, 2, generator(0, [1, 2, 3], "pair")).tolist() == [
        [1, 2, 3, 2, 3, 0, 1, 0],
        [3, 0, 1, 0, 1, 2, 3, 2],
    ]
    rng = generator(7, np.array([5, 4000000000], np.uint32), "rejected", 2)
    assert rng.permutation(10).tolist() == [5, 3, 0, 1, 2, 9, 7, 4, 6, 8]
    assert rng.random(3).tolist() == [0.9305252408444894, 0.20554084288535968, 0.5677126724859032]
    [masked], [weight] = sft_noise.draw(6, generator(0, [1], "sft"))
    assert masked.tolist() == [True, True, False, True, False, True]
    np.testing.assert_allclose(weight, [0.20876758, 0.20876758, 0, 0.20876758, 0, 0.20876758], rtol=1e-6)
    for name, want in (
        ("elbo", "010111010 111111110 011001110 000100001"),
        ("elbo_stratified", "000001010 100110000 110111011 110101111"),
    ):
        masked = noise.state_masks(9, name, 4, 1, generator(0, [1], "chosen"))
        assert ["".join(map(str, row)) for row in masked.astype(int)] == want.split()
    masked = noise.state_masks(9, "radau", 2, 3, generator(0, [1], "pair"))
    assert ["".join(map(str, row)) for row in masked[1:].astype(int)] == ["010010010", "100100001", "001001100"]
    masked = noise.state_masks(9, "spread", 4, 2, generator(0, [1], "chosen"))
    weight = noise.state_weights(masked, "spread", 4, 2)
    factor = noise.gradient_states(masked, weight, 3, generator(0, [1], "chosen gradient"))
    assert factor.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, 3.0, 3.0, 2.0])


def test_drawing_changes_with_the_code(monkeypatch):
    """Other masks or other weights of an estimator are another drawing; an estimator has its own."""
    names = [(name, False) for name in noise.ESTIMATORS] + [("elbo", True), ("elbo_stratified", True)]
    before = [noise.drawing(*each) for each in names]
    assert len({*before}) == len(names)

    def changed(patch):
        after = [noise.drawing(*each) for each in names]
        patch.undo()
        return [name for (name, _), old, new in zip(names, before, after) if old != new]

    for owner, name, of in (
        (noise, "trajectories", ["stepwise", "spread"]),
        (noise, "elbo_masks", ["elbo", "elbo_stratified"]),
    ):
        monkeypatch.setattr(owner, name, turned(getattr(owner, name)))
        assert changed(monkeypatch) == of, name
    for name, estimator in noise.ESTIMATORS.items():
        monkeypatch.setitem(noise.ESTIMATORS, name, estimator._replace(weights=turned(estimator.weights)))
        assert changed(monkeypatch) == [name]


def turned(function):
    """A function whose array is turned around along the tokens, or along the levels."""

    def other(*args, **settings):
        return function(*args, **settings)[..., ::-1]

    return other


def test_keys():
    def first(*key):
        return generator(*key).integers(1 << 62)

    tokens = np.array([5, 6, 7])
    assert (
        first(1, tokens, "chosen", 0)
        == first(1, [5, 6, 7], "chosen")
        == first(1, np.uint32([5, 0, 6, 0, 7])[::2], "chosen")
    )
    keys = [
        (1, [5, 6, 7], "chosen", 0),
        (2, [5, 6, 7], "chosen", 0),
        (1, [5, 6, 7], "rejected", 0),
        (1, [5, 6, 7], "sft", 0),
        (1, [5, 6, 7], "chosen", 1),
        (1, [5, 6, 8], "chosen", 0),
        (1, [7, 6, 5], "chosen", 0),
        (1, [5, 6], "chosen", 0),
        (11, [5, 6, 7], "chosen", 0),
        (1, [5, 6, 7], "chosen", 11),
    ]
    assert len({first(*key) for key in keys}) == len(keys)
