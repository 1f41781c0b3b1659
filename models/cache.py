"""Keys and values of rows between forward passes, so that a pass need not read all tokens of a row.

A row has a slot. A pass reads a window of each row: it writes the window's keys and values in their places, and the
window's tokens see what the slot then holds. Windows of any length share a pass, end to end in one sequence.

N tokens of all windows, S slots, H heads, G key/value heads, hd head width.
"""

import itertools
from typing import NamedTuple

import torch

from models.attention import has_flash, sdpa


class Store:
    """Keys and values of all layers. A layer's are allocated when it first writes some."""

    def __init__(self, slots, capacity):
        """capacity: tokens of the longest row."""
        self.slots, self.capacity = slots, capacity
        self.layers = {}  # {layer: (keys, values)}, (S * capacity, G, hd) each

    def write(self, k, v, places, layer):
        """Write k, v (1, G, N, hd) at `places` (N,) of S * capacity; returns all keys and all values of the layer."""
        if layer not in self.layers:
            shape = (self.slots * self.capacity, k.shape[1], k.shape[3])
            self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        for kept, new in zip(self.layers[layer], (k, v)):
            kept[places] = new[0].transpose(0, 1)
        return self.layers[layer]


class Window(NamedTuple):
    """Tokens first..stop of the row in a slot. They see its first `keys` tokens, or those of them that `mask` says."""

    slot: int
    first: int
    stop: int
    keys: int
    mask: torch.Tensor | None = None  # (stop - first, keys) bool; equal masks of a pass are one tensor

    @property
    def length(self):
        return self.stop - self.first


class Windows:
    """The windows of a forward pass, one of each row, in the order of their slots. For models, as attention.Rows.

    places (N,) int64: each token's place in its row.
    """

    def __init__(self, store, windows, device):
        self.store, self.windows = store, windows
        self.longest = max(window.stop for window in windows)
        places = [torch.arange(window.first, window.stop) for window in windows]
        slots = [window.slot * store.capacity + each for window, each in zip(windows, places)]
        self.places, self.slots = (torch.cat(each).to(device, non_blocking=True) for each in (places, slots))
        self.groups = self.alike()
        masks = [group[0].mask for group in self.groups]
        self.masks = [None if mask is None else mask.to(device, non_blocking=True) for mask in masks]
        self.is_plain = all(window.mask is None for window in windows)
        if self.is_plain:  # what flash attention reads: where the windows end, the slots end, and the keys of each
            ends = torch.tensor([0, *(window.length for window in windows)]).cumsum(0)
            slots = torch.tensor([*(window.slot for window in windows), store.slots]) * store.capacity
            keys = torch.tensor([window.keys for window in windows])
            ends, slots, keys = (x.to(device, torch.int32, non_blocking=True) for x in (ends, slots, keys))
            self.ends, self.slot_ends, self.keys = ends, slots, keys

    def alike(self):
        """[[Window]] of neighbours in neighbouring slots that have equal lengths, keys and masks: a batch of SDPA."""

        def kind(numbered):
            number, window = numbered
            return window.slot - number, window.length, window.keys, id(window.mask)

        groups = itertools.groupby(enumerate(self.windows), kind)
        return [[window for _, window in group] for _, group in groups]

    def attend(self, q, k, v, scale=None, layer=None):
        """q (1, H, N, hd), k and v (1, G, N, hd) of layer number `layer` -> (1, H, N, hd), as Rows.attend()."""
        keys, values = self.store.write(k, v, self.slots, layer)  # (S * capacity, G, hd)
        if self.is_plain and has_flash(q):
            return self.flash(q, keys, values, scale)
        outputs, start = [], 0
        for group, mask in zip(self.groups, self.masks):
            first, count = group[0], len(group)
            stop = start + count * first.length
            q_rows = q[0, :, start:stop].unflatten(1, (count, first.length)).transpose(0, 1)  # (count, H, length, hd)
            k_rows, v_rows = (
                x.unflatten(0, (self.store.slots, -1))[first.slot : first.slot + count, : first.keys].transpose(1, 2)
                for x in (keys, values)
            )  # (count, G, keys, hd)
            out = sdpa(q_rows, k_rows, v_rows, mask, scale)
            outputs.append(out.transpose(0, 1).flatten(1, 2))  # (H, count * length, hd)
            start = stop
        return torch.cat(outputs, 1)[None]

    def flash(self, q, keys, values, scale):
        """attend() by torch.nn.attention.varlen: a slot's keys end before the next slot of the pass."""
        from torch.nn.attention.varlen import varlen_attn

        shared = q.shape[1] != keys.shape[1]
        out = varlen_attn(
            q[0].transpose(0, 1),
            keys,
            values,
            self.ends,
            self.slot_ends,
            max(window.length for window in self.windows),
            max(window.keys for window in self.windows),
            scale=scale,
            enable_gqa=shared,
            seqused_k=self.keys,
        )
        return out.transpose(0, 1)[None]
