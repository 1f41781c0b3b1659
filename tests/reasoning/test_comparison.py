"""Tests of the table's sums: McNemar's test against a count of all outcomes, and the models' names.

bash tests/run.sh tests/reasoning/test_comparison.py
"""

import math
import time

import pytest

from reasoning import comparison


@pytest.mark.parametrize("won, lost", [(0, 0), (1, 0), (5, 0), (0, 5), (4, 9), (9, 4), (7, 7), (30, 12)])
def test_mcnemar_counts_all_outcomes(won, lost):
    """Two-sided exact: the share of all 2^n outcomes of n fair coins that are at most as likely as this one."""
    n = won + lost
    likely = [math.comb(n, k) for k in range(n + 1)]
    assert comparison.mcnemar(won, lost) == pytest.approx(sum(each for each in likely if each <= likely[won]) / 2**n)


@pytest.mark.parametrize("changed", [0, 5, 6, 10, 20, 30, 50, 100, 101, 198])
def test_least_gain_is_the_first_split_below_5_percent(changed):
    """Against a search of all splits, with p counted from the binomial distribution in floats."""
    split = [math.comb(changed, k) * 0.5**changed for k in range(changed + 1)]
    p = [min(1.0, 2 * sum(split[: min(k, changed - k) + 1])) for k in range(changed + 1)]
    enough = [won for won in range((changed + 1) // 2, changed + 1) if p[won] < 0.05]
    found = comparison.least_gain(changed)
    assert (found is None) == (not enough) == (changed < 6)
    if found:
        assert found.won == enough[0] and found.won + found.lost == changed and found.p == pytest.approx(p[found.won])


def test_least_gain_of_many_items():
    """In seconds: 60,000 items are planned for as 200 are."""
    started = time.process_time()
    assert comparison.least_gain(9000)[:2] == (4594, 4406)
    assert time.process_time() - started < 5


def test_gain_line():
    assert comparison.gain_line(200, 30) == (
        "with 200 items of which 15% change sides (30), 21 to 9 (+6.0 points) is the least gain that gives p < 0.05"
    )
    assert comparison.gain_line(20, 3).endswith("(3), no gain gives p < 0.05: take more items")


@pytest.mark.parametrize(
    "models, names",
    [
        (["examples/tiny"], ["examples-tiny"]),
        (["runs/a/final", "runs/b/final"], ["a-final", "b-final"]),
        (["x/a/final", "y/a/final", "b/tiny"], ["x-a-final", "y-a-final", "b-tiny"]),
        (["x/a-b/c", "x/a/b-c"], ["x-a-b-c-1", "x-a-b-c-2"]),
        (["GSAI-ML/LLaDA-8B-Base"], ["GSAI-ML-LLaDA-8B-Base"]),
    ],
)
def test_labels(models, names):
    assert list(comparison.labels(models).values()) == names
