"""Tests of what only a CUDA card shows: page-locked copies, the share of memory that a process may take, run-ahead.

bash tests/run.sh tests/training/test_on_a_card.py
"""

import numpy as np
import pytest
import torch
from torch import nn

from training import engine, fetches, memory

pytestmark = pytest.mark.gpu


def test_send_copies_first():
    """The copy goes through pinned memory of its own: the array may change at once."""
    array = np.arange(2**20)
    sent = engine.send(array, "cuda")
    array[:] = 0
    assert sent.is_cuda and torch.equal(sent.cpu(), torch.arange(2**20))


def test_a_share_of_the_memory():
    """memory_now() keeps to the share that the process may take; what it calls free can be had, and not much more."""
    device = torch.device("cuda", torch.cuda.current_device())
    _, card = torch.cuda.mem_get_info(device)
    share = 2 * 2**30 / card
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        held, free = memory.memory_now(device)
        assert held + free <= 2.01 * 2**30
        taken = torch.empty(int(0.9 * free), dtype=torch.uint8, device=device)
        assert memory.memory_now(device)[0] >= held + taken.numel()
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.2 * free), dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_host_waits_for_the_block_before():
    """When the host is done with the last block's forward pass, the device has begun the block before."""
    blocks = nn.Sequential(*(nn.Linear(4096, 4096, device="cuda") for _ in range(8)))
    begun = []

    def note(*_):
        begun.append(torch.cuda.current_stream().record_event())

    for block in blocks:
        block.register_forward_pre_hook(note)
    fetches.bound_run_ahead(list(blocks))
    x = torch.randn(16384, 4096, device="cuda", requires_grad=True)
    blocks(x).sum().backward()
    torch.cuda.synchronize()
    begun.clear()
    blocks(x)
    assert len(begun) == 8 and begun[-2].query()
