"""Tests of pass@k, majority@k and their intervals, against counts over all subsets and simulated items.

bash tests/run.sh tests/reasoning/test_estimates.py
"""

from itertools import combinations

import numpy as np
import pytest

from reasoning import estimates, tasks


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8])
def test_pass_at_k_counts_all_subsets(samples):
    for right in range(samples + 1):
        verdicts = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            subsets = list(combinations(verdicts, k))
            assert estimates.pass_at(k, samples, right) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_has_no_bias():
    """The mean over many draws of 6 samples is the chance itself, 1 - (1 - p)^k; the plain share of 6 is not."""
    p, rng = 0.3, np.random.default_rng(1)
    right = rng.binomial(6, p, 20000)
    for k in (1, 2, 4):
        mean = np.mean([estimates.pass_at(k, 6, count) for count in right.tolist()])
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=0.01)


def test_sizes():
    assert [estimates.sizes(n) for n in (1, 2, 3, 4, 5, 8, 16)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 5],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 16],
    ]


@pytest.mark.parametrize(
    "kind, extracted, places, winner",
    [
        ("number", ["18", "20", None, "18.0"], [0, 1, None, 0], 0),
        ("number", ["1/2", "2/4", "0.5", "3", "3"], [0, 0, 0, 3, 3], 0),
        ("number", ["20", "18", "18"], [0, 1, 1], 1),
        ("number", ["20", "18", "18", "20"], [0, 1, 1, 0], 0),  # a tie: the first
        ("number", [None, "7", "8"], [None, 1, 2], 1),
        ("number", [None, None], [None, None], None),
        ("letter", ["B", "A", "A"], [0, 1, 1], 1),
        ("words", ["the red box", "Mia", "red box", "mia."], [0, 1, 0, 1], 0),
        ("countdown", ["1 + 2 * 3", "18 + 75 - 83", "75 - 83 + 18", "(18 + 75) - 83"], [0, 1, 1, 1], 1),
        ("sudoku", ["3142243142131324", "3142", "3142243142131324"], [0, 1, 0], 0),
        ("time", ["9:35", "21:35", "9:35"], [0, 1, 0], 0),
    ],
)
def test_votes_are_compared_as_answers_are(kind, extracted, places, winner):
    assert estimates.votes(kind, extracted) == places and estimates.majority(places) == winner


def test_expressions_vote_by_what_they_are_worth():
    pytest.importorskip("math_verify")
    assert estimates.votes("expression", [r"\frac{1}{2}", "x+1", "0.5", "1 + x"]) == [0, 1, 0, 1]


def test_a_tie_favours_no_answer():
    """Of two answers with two votes each, in every order of the samples, each wins half of the time."""
    winners = []
    for places in combinations(range(4), 2):
        extracted = ["7" if place in places else "8" for place in range(4)]
        winners.append(extracted[estimates.majority(estimates.votes("number", extracted))])
    assert winners.count("7") == winners.count("8") == 3


def test_interval_is_wilsons_for_verdicts():
    assert estimates.interval([1, 0, 1, 1]) == tasks.wilson(0.75, 4)
    assert estimates.interval([0, 0, 0]) == tasks.wilson(0.0, 3) and estimates.interval([0, 0, 0])[1] > 0.5


def test_bootstrap_covers_the_mean():
    """Items of different difficulty, 8 samples each: the interval holds the true mean in about 95 of 100 cases."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        difficulty = rng.beta(0.6, 0.6, 60)  # mean 0.5
        low, high = estimates.interval((rng.binomial(8, difficulty) / 8).tolist())
        covered += low <= 0.5 <= high
    assert 0.90 <= covered / 200 <= 0.985
    values = [0.25, 0.5, 1.0, 0.0, 0.75]
    assert estimates.interval(values) == estimates.interval(values)
