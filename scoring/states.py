"""The rows of a forward pass: the masked states of a response, and how they are divided into forward passes.

S states, L length, n response tokens, P prompt tokens.
"""

import math
from typing import NamedTuple

import numpy as np


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

    def first(self, rows):
        """The first `rows` rows, of the graph's too."""
        graph = self.graph.first(rows) if self.graph else None
        return States(self.inputs[:rows], self.targets[:rows], self.weight[:rows], graph)

    def carrying(self, factor, k):
        """These States, of which k rows carry the gradient, weighted by `factor` (S,) of noise.gradient_states.

        Always k rows, even if fewer factors are not 0: ranks must make the same backward passes.
        """
        rows = np.argsort(factor == 0, kind="stable")[:k]
        graph = States(self.inputs[rows], self.targets[rows], self.weight[rows] * factor[rows, None])
        return self._replace(graph=graph)

    def segments(self, states_per_forward):
        """Yields the row indices of each forward pass: always ceil(S / states_per_forward) arrays.

        States that reveal nothing are left out, but no array is empty: ranks must make the same forward passes.
        """
        live = self.weight.any(axis=1)
        for first in range(0, len(self.inputs), states_per_forward):
            rows = np.arange(first, min(first + states_per_forward, len(self.inputs)))
            yield rows[live[rows]] if live[rows].any() else rows[:1]


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


def backward_passes(counts, carrying, states_per_forward):
    """Backward passes of score_and_backward for responses of `counts` states, of which `carrying` have a graph."""
    segments = [math.ceil(count / states_per_forward) for count in carrying]
    return 1 if carrying == counts and max(segments) == 1 else sum(segments)


def sizes(count):
    """Numbers of states per forward pass that are worth a trial: 1, 2, 4 ..., half of `count`, all of them."""
    powers = {2**power for power in range(count.bit_length())}
    return sorted({power for power in powers if power < count} | {math.ceil(count / 2), count})
