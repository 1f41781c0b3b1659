"""Divide rows of any length into forward passes of at most `tokens` tokens.

A pass holds whole rows end to end, of any responses and pairs. What has one loss (a pair, or the rows of
an SFT micro-batch) is called a piece. score.py makes these passes, plan.py counts them. Lengths are in tokens.
"""

import bisect
from typing import NamedTuple

ENOUGH = 8192  # tokens in a forward pass: with more a card is no faster, and the bus is no better hidden


class Passes(NamedTuple):
    """The passes of some pieces. Rows are (piece, index among the piece's rows)."""

    without_graph: list  # [[row]]: rows that are scored first, as a loss needs all scores of its piece
    whole: list  # [[piece]]: pieces that are scored and go backward in one pass
    with_graph: list  # [[row]]: rows that carry the gradient, once the slope of their loss is known

    @property
    def counts(self):
        """(passes without a graph, passes with one)."""
        return len(self.without_graph), len(self.whole) + len(self.with_graph)

    def filled_up(self, without_graph, with_graph):
        """With empty passes, up to these counts: under ZeRO all ranks must make the same passes."""
        more = with_graph - self.counts[1]
        return Passes(filled_up(self.without_graph, without_graph), self.whole, self.with_graph + [[]] * more)


def most_tokens(longest, heaviest, pieces):
    """The largest useful number of tokens of a pass: all of a step, at most ENOUGH, or a whole piece if it has more.

    longest: tokens of the longest row. heaviest: of all rows of a piece, which one graph may then hold.
    """
    return max(longest, min(heaviest * pieces, max(heaviest, ENOUGH)))


def divide(lengths, graph_lengths, tokens, is_alike=False, is_linear=False):
    """The Passes of pieces at `tokens` a pass.

    lengths: [[length]] of each piece's rows. graph_lengths: of those that carry the gradient. Pieces that fit a pass
    with their whole graph share such passes. The rows of the others are scored without a graph first, then those that
    carry the gradient go through the model again.

    is_alike: the rows of a pass must have one length, for models that cannot read rows of several lengths at once.
    is_linear: losses are linear in the scores: their slopes are known, and no pass without a graph is needed.
    """

    def is_whole(piece):
        if lengths[piece] != graph_lengths[piece] or sum(lengths[piece]) > tokens:
            return False
        return not is_alike or len(set(lengths[piece])) <= 1

    whole = [piece for piece in range(len(lengths)) if is_whole(piece)]
    divided = [piece for piece in range(len(lengths)) if not is_whole(piece)]
    sizes = [sum(lengths[piece]) for piece in whole]
    kinds = [max(lengths[piece], default=0) for piece in whole]
    return Passes(
        without_graph=[] if is_linear else rows_of(divided, lengths, tokens, is_alike),
        whole=pick(whole, together(sizes, tokens, kinds if is_alike else None)),
        with_graph=rows_of(divided, graph_lengths, tokens, is_alike),
    )


def rows_of(pieces, lengths, tokens, is_alike):
    """Passes of all rows of `pieces`."""
    rows = [(piece, index) for piece in pieces for index in range(len(lengths[piece]))]
    return pick(rows, fill([lengths[piece][index] for piece, index in rows], tokens, is_alike))


def fill(lengths, tokens, is_alike=False):
    """The passes of rows of these lengths, as lists of indices. A row longer than `tokens` has a pass of its own."""
    return together(lengths, tokens, lengths if is_alike else None)


def together(sizes, tokens, kinds=None):
    """Bin packing, best fit decreasing: lists of indices of `sizes`, each with a sum of at most `tokens`.

    A size above `tokens` has a list of its own.

    kinds: indices share a list only if their kinds are equal; None: all may.

    >>> together([3, 9, 4, 2], 6)
    [[1], [2, 3], [0]]
    """
    found, room = [], {}  # {kind: [(tokens left, place in found)], sorted}
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size, open_lists = sizes[index], room.setdefault(kinds and kinds[index], [])
        fitting = bisect.bisect_left(open_lists, (size,))  # the fullest that has room
        if fitting < len(open_lists):
            left, place = open_lists.pop(fitting)
        else:
            left, place = tokens, len(found)
            found.append([])
        found[place].append(index)
        bisect.insort(open_lists, (left - size, place))
    return found


def pick(values, lists):
    """`lists` of indices, with `values` in the place of the indices."""
    return [[values[index] for index in each] for each in lists]


def filled_up(passes, count):
    """`passes`, with empty ones added up to `count`."""
    return passes + [[]] * (count - len(passes))
