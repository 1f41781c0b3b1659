"""Memory that this process holds and may take, and the largest batch of states that fits."""

import os
import resource
from pathlib import Path

import torch

ROOM = 0.8  # the share of free memory that a trial may plan to fill


def unborn(engine):
    """Bytes of Adam's moments, and of its step's temporary, that are not there before the first step (ZeRO-0 alone)."""
    if engine.zero_optimization_stage() or engine.optimizer is None:
        return 0
    return 12 * sum(parameter.numel() for parameter in engine.module.parameters() if parameter.requires_grad)


def grow(sizes, load, trial, ranks, later=0):
    """The largest of the ascending `sizes` that fits, on every rank: (size, its peak in GiB on this rank).

    trial(size) does the work; load(size) says in what proportion it takes memory; later: bytes to be left free. A size is tried only where what the one
    before it took, in proportion, would still leave room to spare: out of memory in the middle of a backward pass cannot be
    undone under ZeRO-3, so it is never met but with the first.
    """
    cuda = ranks.device.type == "cuda"
    for size, after in zip(sizes, [*sizes[1:], None]):
        if cuda:
            torch.cuda.reset_peak_memory_stats(ranks.device)
        before, free = memory_now(ranks.device)
        free -= later
        trial(size)
        peak = (
            torch.cuda.max_memory_allocated(ranks.device)
            if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        )
        if after is None or not all(ranks.gather((peak - before) * load(after) / load(size) < ROOM * free)):
            return size, peak / 2**30


def memory_now(device):
    """Bytes that this process holds, and bytes that it may still take."""
    if device.type == "cuda":
        held, (free, card) = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - held
        return held, min(free, torch.cuda.get_per_process_memory_fraction(device) * card - held)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    [free] = [
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    ]
    return held, free * 2**10 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def memory_peaks(device):
    """(GPU, host) peak in GiB of this process; None for the GPU on a CPU."""
    gpu = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return gpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
