"""Tests of attention.py: rows that stand end to end attend as each would alone, whichever kernel takes them.

bash tests/run.sh tests/models/test_attention.py
"""

import pytest
import torch
from torch.nn import functional as F

from models import attention

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
