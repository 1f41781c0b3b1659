"""Tests of scoring/passes.py: how rows of any length are divided into forward passes.

bash tests/run.sh tests/scoring/test_passes.py
"""

import itertools

import numpy as np
import pytest

from scoring import passes


def test_by_hand():
    """The largest first, each in the first pass that has room; a row that is too long is alone."""
    assert passes.fill([5, 3, 4, 2, 6], 10) == [[4, 2], [0, 1, 3]]
    assert passes.fill([5, 30, 5], 10) == [[1], [0, 2]]
    assert passes.fill([2, 3, 2, 3, 2], 6, is_alike=True) == [[1, 3], [0, 2, 4]]
    assert passes.fill([1, 2, 3], 1) == [[2], [1], [0]] and passes.fill([], 5) == []


def test_whole_pieces_share_a_pass():
    """Of 4 pieces at 10 tokens: two fit together, one fits alone, one is divided."""
    lengths = [[3, 3], [4], [6, 6], [9]]
    found = passes.divide(lengths, lengths, 10)
    assert found.whole == [[3], [0, 1]]
    assert found.without_graph == found.with_graph == [[(2, 0)], [(2, 1)]]
    assert found.counts == (2, 4)


def test_a_piece_of_which_only_some_rows_carry_the_gradient_is_divided():
    """All of its rows are scored without a graph, though they fit one pass; the rows with a graph are others."""
    found = passes.divide([[2, 2], [2, 2]], [[2], [2]], 8)
    assert found == ([[(0, 0), (0, 1), (1, 0), (1, 1)]], [], [[(0, 0), (1, 0)]])


def test_alike():
    """A piece with rows of two lengths is never whole; whole pieces share a pass if all of their rows are alike."""
    lengths = [[3, 2], [2, 2], [3], [2]]
    found = passes.divide(lengths, lengths, 100, is_alike=True)
    assert found.whole == [[1, 3], [2]]
    assert found.without_graph == found.with_graph == [[(0, 0)], [(0, 1)]]


def test_filled_up():
    """With passes that hold no row, up to the largest count of any rank; enough already: nothing is added."""
    lengths = [[5, 5], [2]]
    found = passes.divide(lengths, lengths, 6)
    assert found.counts == (2, 3)
    more = found.filled_up(3, 5)
    assert more.counts == (3, 5) and more.whole == found.whole
    assert more.without_graph == [*found.without_graph, []] and more.with_graph == [*found.with_graph, [], []]
    assert found.filled_up(2, 3) == found
    assert passes.divide([], [], 6).filled_up(1, 2) == ([[]], [], [[], []])


@pytest.mark.parametrize("is_alike", [False, True])
@pytest.mark.parametrize("is_linear", [False, True])
def test_any_division(is_alike, is_linear):
    """Whatever the pieces: every row once, no pass too large, and no two passes that could be one."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = [rng.integers(1, 9, rng.integers(0, 6)).tolist() for _ in range(rng.integers(0, 7))]
        carrying = [each if rng.random() < 0.6 else each[: rng.integers(0, 1 + len(each))] for each in lengths]
        tokens = int(rng.integers(1, 40))
        found = passes.divide(lengths, carrying, tokens, is_alike, is_linear)
        whole = sorted(itertools.chain.from_iterable(found.whole))
        for piece, (all_rows, graph_rows) in enumerate(zip(lengths, carrying)):
            fits = sum(all_rows) <= tokens and not (is_alike and len(set(all_rows)) > 1)
            assert (piece in whole) == (fits and all_rows == graph_rows), "whole if its graph fits a pass, not else"
        check(found.with_graph, carrying, whole, tokens, is_alike)
        check(found.without_graph, [[]] * len(lengths) if is_linear else lengths, whole, tokens, is_alike)
        sizes = [[sum(lengths[piece]) for piece in each] for each in found.whole]
        assert len(set(whole)) == len(whole) and all(sum(each) <= tokens for each in sizes)
        kinds = [{length for piece in each for length in lengths[piece]} for each in found.whole]
        assert not is_alike or all(len(kind) <= 1 for kind in kinds)
        assert_no_two_are_one(list(map(sum, sizes)), kinds, tokens, is_alike)


def check(found, lengths, whole, tokens, is_alike):
    """`found` are the rows of the divided pieces, each once, in passes of at most `tokens`."""
    rows = [(piece, index) for piece, each in enumerate(lengths) if piece not in whole for index in range(len(each))]
    assert sorted(itertools.chain.from_iterable(found)) == rows
    sizes = [[lengths[piece][index] for piece, index in each] for each in found]
    assert all(each and (sum(each) <= tokens or len(each) == 1) for each in sizes)
    assert not is_alike or all(len(set(each)) == 1 for each in sizes)
    assert_no_two_are_one(list(map(sum, sizes)), list(map(set, sizes)), tokens, is_alike)


def assert_no_two_are_one(sizes, kinds, tokens, is_alike):
    for (one, kind), (other, same) in itertools.combinations(zip(sizes, kinds), 2):
        assert one + other > tokens or is_alike and kind != same
