"""Attention over rows of any length, end to end in one sequence: a token sees its own row alone.

So a forward pass needs no padding, and each linear layer takes all rows in one product. Two kinds of rows:

    Rows         bidirectional: each token sees its whole row
    BlockRows    block-causal: a row is the clean text, then noisy copies of its blocks (docs/method.md, the shared row)

cache.py adds a third, the sampler's: windows of rows whose other keys and values are kept.

On a CUDA card Rows are torch's variable-length flash attention; elsewhere each run of rows of equal length is a batch
of SDPA, with the same result. BlockRows are SDPA with a mask on any device.

N tokens of all rows, B rows, H heads, G key/value heads, hd head width. Of a block-causal row: C clean tokens, K noisy
copies that hold the same m tokens.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "end_to_end"  # of this attention among transformers'


class Rows:
    """Where bidirectional rows of these lengths stand in a sequence of N tokens.

    places (N,) int64: each token's place in its row. ends (B + 1,) int32: where rows begin and
    the last one ends, flash attention's cu_seq.
    """

    def __init__(self, lengths, device):
        self.lengths, self.longest = lengths, max(lengths)
        self.places = torch.cat([torch.arange(length) for length in lengths]).to(device, non_blocking=True)
        ends = torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)
        self.ends = ends.to(device, non_blocking=True)

    def groups(self):
        """(start, rows, length) of each run of neighbours of equal length."""
        start = 0
        for length, group in itertools.groupby(self.lengths):
            count = len(list(group))
            yield start, count, length
            start += count * length

    def attend(self, q, k, v, scale=None, layer=None):
        """Attention of each row to itself: q (1, H, N, hd), k and v (1, G, N, hd) -> (1, H, N, hd).

        scale: of the products, hd^-0.5 without one. layer: its number, for rows whose keys are kept (cache.Windows).
        """
        if has_flash(q):
            return flash(q, k, v, self, scale)
        parts = []
        for start, count, length in self.groups():
            q_rows, k_rows, v_rows = (as_batch(x, start, count, length) for x in (q, k, v))
            parts.append(as_one_row(sdpa(q_rows, k_rows, v_rows, None, scale)))
        return torch.cat(parts, 2)


class Copies(NamedTuple):
    """Copies of one row that hold the same tokens, in a sequence of N tokens."""

    start: int
    count: int  # K
    length: int  # m
    clean: slice  # the row's clean text
    mask: torch.Tensor | None  # (m, C + m): what a token sees of the clean text and of its copy; None: everything


class BlockRows:
    """Where rows of a block-causal model stand in a sequence of N tokens, and what each token sees.

    rows: [rows.SharedRow]. blocks: families.Blocks. A noisy token sees its own block of its own copy, and clean tokens
    of earlier blocks. A clean token sees clean tokens up to the end of its block, or up to itself (blocks.is_causal).
    places (N,) int64: each token's place in its text.
    """

    def __init__(self, rows, blocks, device):
        self.blocks, self.longest = blocks, max(int(row.places.max()) for row in rows) + 1
        self.places = torch.from_numpy(np.concatenate([row.places for row in rows])).to(device, non_blocking=True)
        self.clean = []  # (slice, mask) of each row's clean text
        self.parts = []  # in the order of the sequence: a place in self.clean, or Copies
        first = 0
        for row in rows:
            clean = slice(first, first + row.clean)
            if row.clean:
                self.parts.append(len(self.clean))
                self.clean.append((clean, self.clean_mask(clean)))
            for start, count, length in row.alike():
                self.parts.append(Copies(first + start, count, length, clean, self.mask(clean, first + start, length)))
            first += row.length

    def clean_mask(self, clean):
        """(C, C) bool: what clean tokens see; None: everything."""
        places, size = self.places[clean], self.blocks.size
        if self.blocks.is_causal:
            return places[:, None] >= places
        return None if len(places) <= size else places[:, None] // size >= places // size

    def mask(self, clean, start, length):
        """(m, C + m) bool of copies of `length` tokens from `start` on."""
        size = self.blocks.size
        own = self.places[start : start + length] // size  # (m,) blocks
        if clean.start == clean.stop and length <= size:
            return None  # one block, the first
        return torch.cat((own[:, None] > self.places[clean] // size, own[:, None] == own), 1)

    def attend(self, q, k, v, scale=None, layer=None):
        """As Rows.attend."""
        outputs = []
        for part in self.parts:
            if isinstance(part, int):
                span, mask = self.clean[part]
                outputs.append(sdpa(q[:, :, span], k[:, :, span], v[:, :, span], mask, scale))
                continue
            q_copies, *own = (as_batch(x, part.start, part.count, part.length) for x in (q, k, v))
            shared = [x[:, :, part.clean].expand(part.count, -1, -1, -1) for x in (k, v)]  # (K, G, C, hd)
            k_copies, v_copies = (torch.cat(pair, 2) for pair in zip(shared, own))  # (K, G, C + m, hd)
            outputs.append(as_one_row(sdpa(q_copies, k_copies, v_copies, part.mask, scale)))
        return torch.cat(outputs, 2)


def as_batch(x, start, count, length):
    """`count` neighbouring rows of `length` tokens of x (1, H, N, hd) as a batch (count, H, length, hd)."""
    return x[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)


def as_one_row(x):
    """(count, H, length, hd) -> (1, H, count * length, hd)."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def sdpa(q, k, v, mask, scale):
    """SDPA of q (B, H, L, hd) with keys and values of G heads. mask: (L, keys) bool, or None.

    On CUDA no kernel takes both a mask and shared heads without all products in memory: there k and v are repeated.
    """
    shared = q.shape[1] // k.shape[1]
    if mask is not None and shared > 1 and q.is_cuda:
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=shared > 1)


def has_flash(q):
    """Whether torch's flash attention takes a tensor: half precision, on a card from compute capability 8.0 on.

    Heads must be multiples of 8 wide and at most 256: unlike SDPA, variable-length attention does not pad them.
    """
    half = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.is_cuda and half and torch.cuda.get_device_capability(q.device) >= (8, 0)


def flash(q, k, v, rows, scale):
    """Rows.attend() by torch.nn.attention.varlen."""
    from torch.nn.attention.varlen import varlen_attn

    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, H, hd)
    out = varlen_attn(q, k, v, rows.ends, rows.ends, rows.longest, rows.longest, scale=scale)
    return out.transpose(0, 1)[None]


def in_transformers(module, query, key, value, attention_mask, rows=None, scaling=None, **options):
    """rows.attend() with the signature that transformers calls; without `rows`, transformers' own SDPA attention."""
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    return rows.attend(query, key, value, scaling, module.layer_idx).transpose(1, 2), None  # (1, N, H, hd)


AttentionInterface.register(NAME, in_transformers)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
