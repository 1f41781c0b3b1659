"""Tests of attention.py: rows that stand end to end attend as each would alone, whichever kernel takes them.

bash tests/run.sh tests/models/test_attention.py
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models import attention, cache
from models.families import Blocks
from models.rows import SharedRow

LENGTHS = (5, 5, 33, 1, 33, 12)
GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def close(got, want, dtype):
    """Within float32's rounding, or 2% of the largest number in bfloat16."""
    got, want = got.detach().float(), want.detach().float()
    loose = 2e-2 if dtype == torch.bfloat16 else 2e-6
    assert float((got - want).abs().max()) < loose * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, shared, width", [(4, 4, 16), (4, 2, 64), (4, 2, 20)])
def test_each_row_sees_itself_alone(device, dtype, heads, shared, width):
    """The result and all gradients are those of a pass for each row. On a card in bfloat16, flash attention is used."""
    rng = torch.Generator().manual_seed(0)
    sizes = ((heads, sum(LENGTHS)), (shared, sum(LENGTHS)), (shared, sum(LENGTHS)))
    made = [torch.randn(1, *size, width, generator=rng).to(device, dtype) for size in sizes]
    slope = torch.randn(1, heads, sum(LENGTHS), width, generator=rng).to(device, dtype)
    q, k, v = (each.clone().requires_grad_() for each in made)
    got = attention.Rows(LENGTHS, device).attend(q, k, v)
    (got * slope).sum().backward()

    alone = [each.clone().requires_grad_() for each in made]
    parts = []
    for row in zip(*(each.split(LENGTHS, 2) for each in alone)):
        parts.append(F.scaled_dot_product_attention(*row, enable_gqa=heads != shared))
    want = torch.cat(parts, 2)
    (want * slope).sum().backward()
    close(got, want, dtype)
    for mine, theirs in zip((q, k, v), alone):
        close(mine.grad, theirs.grad, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_places_and_ends(device):
    rows = attention.Rows((2, 3), device)
    assert rows.places.tolist() == [0, 1, 0, 1, 2] and rows.ends.tolist() == [0, 2, 5] and rows.longest == 3
    assert rows.ends.dtype == torch.int32 and rows.places.device.type == device


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, width, expected",
    [(torch.bfloat16, 64, True), (torch.float32, 64, False), (torch.bfloat16, 20, False), (torch.bfloat16, 264, False)],
)
def test_flash_takes_half_precision(dtype, width, expected):
    q = torch.zeros(1, 2, 8, width, dtype=dtype, device="cuda")
    assert attention.has_flash(q) == (expected and torch.cuda.get_device_capability() >= (8, 0))


# Block-causal rows

SHARED = [  # clean tokens, the blocks of each copy (numbers), tokens of the text: what the rows below are made of
    (8, [(2, 3), (2, 3), (2, 3)], 14),
    (4, [(0, 1), (1,), (0, 1), ()], 8),
    (0, [(0,), (0,)], 3),
    (12, [(1, 3), (1, 3), (3,)], 13),
]


def shared_rows(size):
    """SharedRows with blocks of `size` tokens; the last block of each text may be short."""
    rows = []
    for clean, copies, text in SHARED:
        numbers = np.arange(text * size // 4) // size
        rows.append(SharedRow(clean * size // 4, [np.flatnonzero(np.isin(numbers, each)) for each in copies]))
    return rows


def visible(rows, blocks):
    """(N, N) bool: whether a query (row) sees a key (column), by the rule for each pair of tokens."""
    tokens = []  # (row, copy, place) of each; copy 0 is the clean text
    for number, row in enumerate(rows):
        tokens += [(number, 0, place) for place in range(row.clean)]
        tokens += [(number, copy, place) for copy, places in enumerate(row.copies, 1) for place in places.tolist()]

    def sees(query, key):
        (row, copy, place), (key_row, key_copy, key_place) = query, key
        block, key_block = place // blocks.size, key_place // blocks.size
        if row != key_row:
            return False
        if copy == key_copy == 0:
            return key_place <= place if blocks.is_causal else key_block <= block
        return copy == key_copy and block == key_block or key_copy == 0 and key_block < block

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2)])
@pytest.mark.parametrize("size, is_causal", [(4, False), (4, True), (32, False)])
def test_block_causal_rows(device, heads, shared, size, is_causal):
    """A token sees what the rule says for each pair of tokens, forwards and backwards."""
    blocks, rows = Blocks(size, is_causal=is_causal), shared_rows(size)
    N, rng = sum(row.length for row in rows), torch.Generator().manual_seed(0)
    made = [torch.randn(1, count, N, 16, generator=rng).to(device) for count in (heads, shared, shared)]
    slope = torch.randn(1, heads, N, 16, generator=rng).to(device)
    q, k, v = (each.clone().requires_grad_() for each in made)
    where = attention.BlockRows(rows, blocks, device)
    got = where.attend(q, k, v)
    (got * slope).sum().backward()

    alone = [each.clone().requires_grad_() for each in made]
    mask = visible(rows, blocks).to(device)
    want = F.scaled_dot_product_attention(*alone, attn_mask=mask, enable_gqa=heads != shared)
    (want * slope).sum().backward()
    close(got, want, torch.float32)
    for mine, theirs in zip((q, k, v), alone):
        close(mine.grad, theirs.grad, torch.float32)
    assert where.places.tolist() == [place for row in rows for place in row.places]
    assert where.longest == max(text for *_, text in SHARED) * size // 4


# Windows of rows whose other keys and values are kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2)])
def test_windows(device, dtype, heads, shared):
    """Tokens see their row's slot, up to what the window says; what is written stays for the next pass."""
    rng, store = torch.Generator().manual_seed(0), cache.Store(4, 20)
    kept = torch.zeros(2, 4, 20, shared, 16)  # keys and values, by slot
    passes = [  # (slot, first, stop, keys)
        [(0, 0, 20, 20), (1, 0, 7, 7), (2, 0, 7, 7)],
        [(0, 4, 8, 20), (1, 2, 5, 7), (2, 2, 5, 7), (3, 0, 9, 9)],
        [(0, 16, 20, 20), (3, 3, 7, 7)],
    ]
    for layer in (0, 1):
        for windows in passes:
            rows = cache.Windows(store, [cache.Window(*each) for each in windows], device)
            total = sum(stop - first for _, first, stop, _ in windows)
            q, k, v = (torch.randn(1, H, total, 16, generator=rng).to(device, dtype) for H in (heads, shared, shared))
            got, start, want = rows.attend(q, k, v, layer=layer), 0, []
            for slot, first, stop, keys in windows:
                span = slice(start, start + stop - first)
                for place, new in enumerate((k, v)):
                    kept[place, slot, first:stop] = new[0, :, span].transpose(0, 1).cpu()
                mine = (x[slot, :keys].transpose(0, 1)[None].to(device, dtype) for x in kept)
                want.append(F.scaled_dot_product_attention(q[:, :, span], *mine, enable_gqa=heads != shared))
                start = span.stop
            close(got, torch.cat(want, 2), dtype)
