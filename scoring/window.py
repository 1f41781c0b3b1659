"""The pieces of an optimizer step on one rank (pairs, for example), their scores, and the slopes of their losses.

A row is (response, indices): the number of a response among those of all pieces, and the states that the row holds.
score.py makes the forward passes; this file says which rows they hold, and turns scores into losses. S states.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from scoring import passes


class Piece(NamedTuple):
    """What has one loss: the responses of a pair, or the rows of an SFT micro-batch.

    loss_of: list of scores (), one of each response -> loss (). scale: the loss's weight in the step. slopes: d loss
    / d score of each response, floats, where they do not depend on the scores.
    """

    responses: list  # the States of each
    loss_of: Callable
    scale: float = 1.0
    slopes: list | None = None


class Scores:
    """The scores of all states of some responses, 0 until they are known."""

    def __init__(self, responses, device):
        self.starts = np.cumsum([0, *(len(states.inputs) for states in responses)])
        self.flat = torch.zeros(int(self.starts[-1]), dtype=torch.float32, device=device)

    def keep(self, rows, values):
        """Put the scores of the states of `rows` in their places: values (states,).

        Without rows: the pass of a rank that had nothing to do.
        """
        if rows:
            places = torch.tensor([int(self.starts[response]) + index for response, row in rows for index in row])
            self.flat = self.flat.index_put((places.to(values.device, non_blocking=True),), values)

    def by_response(self):
        """[(S,)] of the responses."""
        return [self.flat[start:end] for start, end in zip(self.starts, self.starts[1:])]


class Window:
    """pieces: all of them with slopes, or none."""

    def __init__(self, pieces, device):
        self.pieces, self.device = pieces, device
        self.is_linear = all(piece.slopes is not None for piece in pieces)
        self.responses = [states for piece in pieces for states in piece.responses]
        self.scores, self.slopes = Scores(self.responses, device), None
        starts = np.cumsum([0, *(len(piece.responses) for piece in pieces)]).tolist()
        self.spans = [slice(start, end) for start, end in zip(starts, starts[1:])]  # the responses of each piece
        self.rows = self.graph_rows = None  # [[row]] of each piece, once they are divided

    def rows_of(self, tokens, with_gradient):
        """[[row]] of each piece's states, or of those that carry the gradient, at `tokens` a pass."""
        found = []
        for span in self.spans:
            rows = []
            for response in range(span.start, span.stop):
                states = self.responses[response]
                states = states.with_gradient if with_gradient else states
                rows += [(response, row) for row in states.rows(tokens)]
            found.append(rows)
        return found

    def divide(self, tokens, is_alike):
        """The Passes at `tokens` a pass, with rows as they are named here."""
        self.rows, self.graph_rows = (self.rows_of(tokens, with_gradient) for with_gradient in (False, True))
        lengths = [[each.length(row) for each, row in self.states(rows)] for rows in self.rows]
        graph_lengths = [[each.length(row) for each, row in self.graph_states(rows)] for rows in self.graph_rows]
        found = passes.divide(lengths, graph_lengths, tokens, is_alike, self.is_linear)
        return found._replace(
            without_graph=[[self.rows[piece][index] for piece, index in each] for each in found.without_graph],
            with_graph=[[self.graph_rows[piece][index] for piece, index in each] for each in found.with_graph],
        )

    def states(self, rows):
        """[(States, indices)] of rows."""
        return [(self.responses[response], row) for response, row in rows]

    def graph_states(self, rows):
        """[(States, indices)] of rows among the states that carry the gradient."""
        return [(self.responses[response].with_gradient, row) for response, row in rows]

    def loss_of_pieces(self, pieces, rows, values):
        """The loss () of whole pieces whose `rows` have the scores `values` (states,), which are kept."""
        fresh = Scores(self.responses, self.device)
        fresh.keep(rows, values)
        self.scores.keep(rows, values.detach())
        scores, loss = fresh.by_response(), 0.0 * values.sum()  # with a graph, even if no row scores anything
        for piece in pieces:
            totals = [score.sum() for score in scores[self.spans[piece]]]
            loss = loss + self.pieces[piece].scale * self.pieces[piece].loss_of(totals)
        return loss

    def find_slopes(self):
        """The slopes of the losses, d (scale * loss) / d score of each response, (responses,), as scores are now.

        Those of pieces that are not scored yet are not used.
        """
        found, scores = [], self.scores.by_response()
        for piece, span in zip(self.pieces, self.spans):
            if self.is_linear:
                slopes = torch.tensor(piece.slopes, device=self.device)
            else:
                totals = [score.sum().requires_grad_() for score in scores[span]]
                slopes = torch.stack(torch.autograd.grad(piece.loss_of(totals), totals))
            found.append(piece.scale * slopes)
        self.slopes = torch.cat(found)

    def loss_of_rows(self, rows, values):
        """Scores `values` (states,) of rows with a graph, times the slopes of their losses, added up: ()."""
        if not rows:
            return 0.0 * values.sum()
        if self.is_linear:
            self.scores.keep(rows, values.detach())
        responses = torch.tensor([response for response, row in rows for _ in row])  # (states,)
        responses = responses.to(self.device, non_blocking=True)
        return (self.slopes[responses] * values).sum()

    def results(self):
        """[(loss (), [(S,) of each response])] of the pieces, once all of their scores are known."""
        scores = self.scores.by_response()
        mine = [scores[span] for span in self.spans]
        return [(piece.loss_of([each.sum() for each in one]), one) for piece, one in zip(self.pieces, mine)]
