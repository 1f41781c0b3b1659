"""The rows of a forward: the masked states of a response, and how they are cut into forwards.

S states, L length, n response tokens, P prompt tokens.
"""

import math
from typing import NamedTuple

import numpy as np


class States(NamedTuple):
    """Rows to be scored together: inputs and targets (S, L) int64, weight (S, L) float32, 0 where nothing is scored.

    graph: the rows that carry the gradient, their weights made up for those left out; None: all of them.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    graph: "States | None" = None

    def first(self, rows):
        """The first `rows` rows, of the graph's too."""
        return States(
            self.inputs[:rows], self.targets[:rows], self.weight[:rows], self.graph and self.graph.first(rows)
        )

    def carrying(self, factor, k):
        """With `factor` (S,) of diffusion.gradient_states on the gradient: always k rows, so that ranks make the same passes."""
        rows = np.argsort(factor == 0, kind="stable")[:k]
        return self._replace(
            graph=States(self.inputs[rows], self.targets[rows], self.weight[rows] * factor[rows, None])
        )

    def segments(self, states_per_forward):
        """Row indices, one array a forward: always ceil(S / states_per_forward) of them, whatever the response.

        States that reveal nothing are left out, but no segment is empty: ranks must make the same forwards.
        """
        live = self.weight.any(axis=1)
        for first in range(0, len(self.inputs), states_per_forward):
            rows = np.arange(first, min(first + states_per_forward, len(self.inputs)))
            yield rows[live[rows]] if live[rows].any() else rows[:1]


def response_states(prompt, response, masked, weight, mask_id):
    """States of one response: prompt (P,) and response (n,) ids, masked (S, n) bool, weight (S, n). The prompt is never masked."""
    S, start = len(masked), len(prompt)
    targets = np.tile(np.concatenate((prompt, response)).astype(np.int64), (S, 1))  # (S, L)
    inputs = targets.copy()
    inputs[:, start:][masked] = mask_id
    full = np.zeros(targets.shape, np.float32)
    full[:, start:] = weight
    return States(inputs, targets, full)


def backward_passes(counts, carrying, states_per_forward):
    """Backward passes that score_and_backward makes for responses of `counts` states, of which `carrying` have a graph."""
    segments = [math.ceil(count / states_per_forward) for count in carrying]
    return 1 if carrying == counts and max(segments) == 1 else sum(segments)


def sizes(count):
    """Numbers of states a forward that are worth a trial: 1, 2, 4 ..., the half, all `count`."""
    return sorted({2**power for power in range(count.bit_length()) if 2**power < count} | {math.ceil(count / 2), count})
