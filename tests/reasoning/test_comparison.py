"""Tests of the table's sums: McNemar's test against a count of all outcomes, and the models' names.

bash tests/run.sh tests/reasoning/test_comparison.py
"""

import math

import pytest

from reasoning import comparison


@pytest.mark.parametrize("won, lost", [(0, 0), (1, 0), (5, 0), (0, 5), (4, 9), (9, 4), (7, 7), (30, 12)])
def test_mcnemar_counts_all_outcomes(won, lost):
    """Two-sided exact: the share of all 2^n outcomes of n fair coins that are at most as likely as this one."""
    n = won + lost
    likely = [math.comb(n, k) for k in range(n + 1)]
    assert comparison.mcnemar(won, lost) == pytest.approx(sum(each for each in likely if each <= likely[won]) / 2**n)


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
