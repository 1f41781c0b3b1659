"""The masked states of a response, and the rows of a forward pass that hold them.

A bidirectional model reads each state as a row of its own. A block-causal model reads states of one response as a
shared row: the clean text, then a noisy copy of the response's blocks for each state (docs/method.md).

S states, L length, n response tokens, P prompt tokens.
"""

from typing import NamedTuple

import numpy as np

from models.families import Blocks
from models.rows import SharedRow
from preferences.packed import longest


class States(NamedTuple):
    """States of a response: inputs and targets (S, L) int64, weight (S, L) float32, 0 where nothing is scored.

    graph: the states that carry the gradient, with larger weights for those that are left out; None: all of them.
    blocks: of a block-causal model. All states have the same targets then.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    graph: "States | None" = None
    blocks: Blocks | None = None

    @property
    def with_gradient(self):
        """The States whose scores carry the gradient."""
        return self.graph or self

    @property
    def live(self):
        """Indices of the states that score something: one that reveals nothing needs no forward pass."""
        return np.flatnonzero(self.weight.any(axis=1)).tolist()

    def rows(self, tokens):
        """The live states as rows, tuples of indices: one each, or as many as fit in `tokens` tokens of a shared row.

        The states of a response are divided over its shared rows evenly.
        """
        live = self.live
        if self.blocks is None or not live:
            return [(index,) for index in live]
        whole = self.shared(live)
        room = max(1, (tokens - whole.clean) // max(1, *map(len, whole.copies)))  # states in a row
        parts = np.array_split(live, -(-len(live) // room))
        return [tuple(part.tolist()) for part in parts]

    def length(self, row):
        """Tokens of a row of rows()."""
        return self.inputs.shape[1] if self.blocks is None else self.shared(row).length

    @property
    def tokens(self):
        """Tokens of all states, in one row if they share it."""
        return self.inputs.size if self.blocks is None else self.shared(self.live).length

    def carrying(self, factor):
        """These States, of which only those whose `factor` (S,) is not 0 carry the gradient, weighted by it."""
        kept = np.flatnonzero(factor)
        weight = self.weight[kept] * factor[kept, None]
        return self._replace(graph=States(self.inputs[kept], self.targets[kept], weight, blocks=self.blocks))

    # --- shared rows ---

    def from_clean(self, index):
        """Places of a state's scored tokens that the clean text predicts, each from the token before it."""
        scored = np.flatnonzero(self.weight[index])
        if not self.blocks.first_from_clean:
            return scored[:0]
        return scored[(scored % self.blocks.size == 0) & (scored > 0)]

    def from_copy(self, index):
        """Places of a state's scored tokens that its noisy copy predicts."""
        return np.setdiff1d(np.flatnonzero(self.weight[index]), self.from_clean(index), assume_unique=True)

    def shared(self, row):
        """The SharedRow of some states: copies of blocks that score something, and the clean text before the last."""
        size, numbers = self.blocks.size, np.arange(self.inputs.shape[1]) // self.blocks.size  # (L,) blocks
        scored = [np.unique(numbers[self.from_copy(index)]) for index in row]
        clean = [0, *(int(each[-1]) * size for each in scored if len(each))]
        clean += [int(place) for index in row for place in self.from_clean(index)]
        return SharedRow(max(clean), [np.flatnonzero(np.isin(numbers, each)) for each in scored])


class Joined(NamedTuple):
    """The rows of one forward pass, end to end. B rows, N tokens, M of them scored, in S states."""

    inputs: np.ndarray  # (N,) int64
    rows: list  # B lengths, or B SharedRows
    positions: np.ndarray  # (M,) int64, places in inputs of the scored tokens; of SharedRows, of the logits to read
    targets: np.ndarray  # (M,) int64
    weight: np.ndarray  # (M,) float32
    state: np.ndarray  # (M,) int64, the state that each scored token belongs to, in the order of the rows
    place: np.ndarray  # (M,) int64, its place among the scored tokens of its state


class Scored(NamedTuple):
    """The scored tokens of one state."""

    positions: np.ndarray  # as in Joined, counted from the row's first token
    targets: np.ndarray
    weight: np.ndarray


def join(rows):
    """The Joined of `rows`, [(States, row)]. Without rows: one token of weight 0, for a rank that has nothing to do."""
    if not rows:
        zero, none = np.zeros(1, np.int64), np.zeros(1, np.float32)
        return Joined(zero, [1], zero, zero, none, zero, zero)
    parts = [alone(states, *row) if states.blocks is None else shared(states, row) for states, row in rows]
    inputs, kinds, scored = zip(*parts)
    starts = np.concatenate(([0], np.cumsum([len(each) for each in inputs])[:-1]))
    flat = [(start, one) for start, each in zip(starts, scored) for one in each]  # of each state
    counts = [len(one.positions) for _, one in flat]
    return Joined(
        inputs=np.concatenate(inputs),
        rows=list(kinds),
        positions=np.concatenate([start + one.positions for start, one in flat]),
        targets=np.concatenate([one.targets for _, one in flat]),
        weight=np.concatenate([one.weight for _, one in flat]),
        state=np.repeat(np.arange(len(flat)), counts),
        place=np.concatenate([np.arange(count) for count in counts]),
    )


def alone(states, index):
    """A row of one state: (inputs (L,), L, [Scored])."""
    places = np.flatnonzero(states.weight[index])
    scored = Scored(places, states.targets[index][places], states.weight[index][places])
    return states.inputs[index], states.inputs.shape[1], [scored]


def shared(states, row):
    """A row of several states of a block-causal model: (inputs, SharedRow, [Scored] of each).

    A shifted model's logits at the token before predict a token. It is in the same block: the first of a block is
    predicted by the clean text.
    """
    layout, text = states.shared(row), states.targets[row[0]]
    inputs, scored, start = [text[: layout.clean]], [], layout.clean
    for index, places in zip(row, layout.copies):
        first, others = states.from_clean(index), states.from_copy(index)
        read = start + np.searchsorted(places, others) - (others > 0 if states.blocks.shift else 0)
        tokens = np.concatenate((first, others))
        weight = states.weight[index][tokens]
        scored.append(Scored(np.concatenate((first - 1, read)), text[tokens], weight))
        inputs.append(states.inputs[index][places])
        start += len(places)
    return np.concatenate(inputs), layout, scored


def response_states(prompt, response, masked, weight, mask_id, blocks=None):
    """The States of one response: prompt (P,) and response (n,) ids, masked (S, n) bool, weight (S, n).

    The prompt is never masked. blocks: of a block-causal model.
    """
    S, start = len(masked), len(prompt)
    targets = np.tile(np.concatenate((prompt, response)).astype(np.int64), (S, 1))  # (S, L)
    inputs = targets.copy()
    inputs[:, start:][masked] = mask_id
    full = np.zeros(targets.shape, np.float32)
    full[:, start:] = weight
    return States(inputs, targets, full, blocks=blocks)


def tokens_of(prompt, response, S, blocks):
    """Tokens through the model of S states of responses: prompt, response (...) int, their lengths -> (...)."""
    if blocks is None:
        return S * (prompt + response)
    first, last = (place // blocks.size * blocks.size for place in (prompt, prompt + response - 1))
    return last + S * (prompt + response - first)


def all_masked(packed, masking, least=0):
    """The States of one row, the longest prompt and response of packed pairs, its response masked and all scored.

    It takes as much memory as any row. least: tokens to which responses are padded.
    """
    index, side = longest(packed)
    prompt, *responses = packed[index]
    response = np.resize(responses[side], max(len(responses[side]), least))
    ones = np.ones((1, len(response)))
    return response_states(prompt, response, ones.astype(bool), ones, *masking)
