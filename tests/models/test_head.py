"""Tests of head.py: log-probabilities of targets and their gradients against float64, in chunks of any size.

bash tests/run.sh tests/models/test_head.py
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from models import head

D, V = 24, 300


class Case(NamedTuple):
    x: torch.Tensor  # (N, D)
    weight: torch.Tensor  # (V, D)
    targets: torch.Tensor  # (N,)
    slopes: torch.Tensor  # (N,) of the loss by each log-probability


class Result(NamedTuple):
    logps: torch.Tensor  # (N,)
    grad_x: torch.Tensor
    grad_weight: torch.Tensor


def case(N, dtype=torch.float32, scale=1.0):
    rng = torch.Generator().manual_seed(N)
    x, weight = (scale * torch.randn(size, D, generator=rng).to(dtype) for size in (N, V))
    return Case(x, weight, torch.randint(V, (N,), generator=rng), torch.randn(N, generator=rng))


def truth(x, weight, targets, slopes):
    """Log-probabilities and the gradients of sum(slopes * logps), in float64 from the same numbers."""
    x, weight = (tensor.double().detach().requires_grad_() for tensor in (x, weight))
    logps = (x @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return Result(logps.detach(), *torch.autograd.grad((slopes.double() * logps).sum(), (x, weight)))


def ours(x, weight, targets, slopes):
    made = head.Head(x.shape[1], len(weight)).to(weight.device, weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
    x = x.detach().requires_grad_()
    logps = made(x, targets)
    (slopes * logps).sum().backward()
    return Result(logps.detach(), x.grad, made.weight.grad)


def close(got, want, loose):
    assert float((got.double() - want).norm() / want.norm()) < loose


@pytest.mark.parametrize("rows", [1, 3, 7, 50])
@pytest.mark.parametrize("N", [1, 7, 20])
def test_against_float64(monkeypatch, rows, N):
    """Whatever the chunk: the last is short, or one holds all."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * V * rows)
    for got, want in zip(ours(*case(N)), truth(*case(N))):
        close(got, want, 1e-5)


def test_far_logits():
    """Logits of hundreds: nothing overflows, and a target without a chance has its finite log-probability."""
    for got, want in zip(ours(*case(9, scale=8.0)), truth(*case(9, scale=8.0))):
        assert got.isfinite().all()
        close(got, want, 1e-5)


@pytest.mark.parametrize("device, loose", [("cpu", 2e-2), pytest.param("cuda", 1e-5, marks=pytest.mark.gpu)])
def test_bfloat16(monkeypatch, device, loose):
    """float32 log-probabilities of bfloat16 products, not rounded between on a card; gradients of the weights' type."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * V * 3)
    given = Case(*(tensor.to(device) for tensor in case(20, torch.bfloat16)))
    got, want = ours(*given), truth(*given)
    assert [tensor.dtype for tensor in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    close(got.logps, want.logps, loose)
    close(got.grad_x, want.grad_x, 2e-2)
    close(got.grad_weight, want.grad_weight, 2e-2)


def test_what_is_frozen_gets_nothing():
    x, weight, targets, slopes = case(5)
    made = head.Head(D, V).requires_grad_(False)
    x.requires_grad_()
    made(x, targets).sum().backward()
    assert made.weight.grad is None and x.grad.abs().sum() > 0
    made.requires_grad_(True)
    made(x.detach(), targets).sum().backward()  # a frozen body
    assert made.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("N, words", [(1000, 126464), (1, 126464), (5, 2**28), (4096, 512)])
def test_chunks_cover_the_rows_within_the_bytes(N, words):
    slices = head.chunks(N, words)
    assert np.concatenate([np.arange(N)[rows] for rows in slices]).tolist() == list(range(N))
    most = max(rows.stop - rows.start for rows in slices)
    assert most == 1 or most * words * 4 <= head.CHUNK_BYTES


def test_no_array_of_all_logits(monkeypatch):
    """Neither pass makes a tensor of more than a chunk's logits."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * V * 4)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(
                value.numel()
                for value in (result if isinstance(result, (tuple, list)) else [result])
                if isinstance(value, torch.Tensor)
            )
            return result

    x, weight, targets, slopes = case(200)
    made = head.Head(D, V)
    with Watch():
        made(x.requires_grad_(), targets).backward(slopes)
    assert max(sizes) == D * V  # the head itself; 200 rows of logits would be 60000
    assert 200 * V > D * V > 4 * V
