"""The masked states of a response, and the rows of a forward pass.

S states, L length, n response tokens, P prompt tokens.
"""

from typing import NamedTuple

import numpy as np

from preferences.packed import longest


class States(NamedTuple):
    """Rows to be scored: inputs and targets (S, L) int64, weight (S, L) float32, 0 where nothing is scored.

    graph: the rows that carry the gradient, with larger weights for those that are left out; None: all rows.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    graph: "States | None" = None

    @property
    def with_gradient(self):
        """The States whose scores carry the gradient."""
        return self.graph or self

    @property
    def live(self):
        """Indices of the rows that score something: a state that reveals nothing needs no forward pass."""
        return np.flatnonzero(self.weight.any(axis=1)).tolist()

    def carrying(self, factor):
        """These States, of which only rows whose `factor` (S,) is not 0 carry the gradient, weighted by it."""
        rows = np.flatnonzero(factor)
        graph = States(self.inputs[rows], self.targets[rows], self.weight[rows] * factor[rows, None])
        return self._replace(graph=graph)


class Joined(NamedTuple):
    """The rows of one forward pass, end to end. B rows, N tokens, M of them scored."""

    inputs: np.ndarray  # (N,) int64
    lengths: tuple  # of the B rows
    positions: np.ndarray  # (M,) int64, places of the scored tokens in inputs
    targets: np.ndarray  # (M,) int64
    weight: np.ndarray  # (M,) float32
    row: np.ndarray  # (M,) int64, the row that each scored token belongs to
    place: np.ndarray  # (M,) int64, its place among the scored tokens of its row


def join(rows):
    """The Joined of `rows`, [(States, row)]. Without rows: one token of weight 0, for a rank that has nothing to do."""
    if not rows:
        zero, none = np.zeros(1, np.int64), np.zeros(1, np.float32)
        return Joined(zero, (1,), zero, zero, none, zero, zero)
    lengths = [states.inputs.shape[1] for states, _ in rows]
    weights = [states.weight[row] for states, row in rows]
    scored = [np.flatnonzero(weight) for weight in weights]
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    return Joined(
        inputs=np.concatenate([states.inputs[row] for states, row in rows]),
        lengths=tuple(lengths),
        positions=np.concatenate([start + places for start, places in zip(starts, scored)]),
        targets=np.concatenate([states.targets[row][places] for (states, row), places in zip(rows, scored)]),
        weight=np.concatenate([weight[places] for weight, places in zip(weights, scored)]),
        row=np.repeat(np.arange(len(rows)), [len(places) for places in scored]),
        place=np.concatenate([np.arange(len(places)) for places in scored]),
    )


def response_states(prompt, response, masked, weight, mask_id):
    """The States of one response: prompt (P,) and response (n,) ids, masked (S, n) bool, weight (S, n).

    The prompt is never masked.
    """
    S, start = len(masked), len(prompt)
    targets = np.tile(np.concatenate((prompt, response)).astype(np.int64), (S, 1))  # (S, L)
    inputs = targets.copy()
    inputs[:, start:][masked] = mask_id
    full = np.zeros(targets.shape, np.float32)
    full[:, start:] = weight
    return States(inputs, targets, full)


def all_masked(packed, mask_id, least=0):
    """The States of one row, the longest prompt and response of packed pairs, its response masked and all scored.

    It takes as much memory as any row. least: tokens to which responses are padded.
    """
    index, side = longest(packed)
    prompt, *responses = packed[index]
    response = np.resize(responses[side], max(len(responses[side]), least))
    ones = np.ones((1, len(response)))
    return response_states(prompt, response, ones.astype(bool), ones, mask_id)
