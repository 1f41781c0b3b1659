"""A row of a block-causal model that all masked states of a response share. Imports no torch.

The clean text comes first, then a noisy copy of the response's blocks for each state; attention.BlockRows says what a
token sees of it. C clean tokens, K neighbouring copies that hold the same m tokens.
"""

from typing import NamedTuple

import numpy as np


class SharedRow(NamedTuple):
    """A row of a block-causal model: the clean text, then noisy copies of some of its blocks."""

    clean: int  # tokens of the clean text, from the first on, in whole blocks
    copies: list  # of each copy: the places (m,) of its tokens in the text, int64, in whole blocks

    @property
    def length(self):
        return self.clean + sum(map(len, self.copies))

    @property
    def places(self):
        """(length,) int64."""
        return np.concatenate((np.arange(self.clean), *self.copies))

    def alike(self):
        """(start in the row, K, m) of each run of neighbouring copies that hold the same tokens."""
        start, place = self.clean, 0
        while place < len(self.copies):
            first, count = self.copies[place], 1
            while place + count < len(self.copies) and np.array_equal(first, self.copies[place + count]):
                count += 1
            yield start, count, len(first)
            start, place = start + count * len(first), place + count
