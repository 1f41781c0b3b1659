"""Memory that this process holds and may take, and the largest batch of states that fits."""

import os
import resource
from pathlib import Path
from typing import NamedTuple

import torch

ROOM = 0.8  # the share of free memory that a trial may plan to fill


class Fit(NamedTuple):
    """What largest_that_fits() found."""

    size: int  # tokens in one forward pass
    peak_gib: float  # of this rank, in its trial


def largest_that_fits(first, most, trial, ranks, reserved=0):
    """The most tokens of a forward pass, from `first` to `most`, that fit on every rank: a Fit.

    Try numbers in ascending order and stop before one that is predicted not to fit: under ZeRO-3 an out-of-memory error
    inside backward cannot be recovered.

    trial(tokens): do the work once. reserved: bytes to leave free.
    """
    size = first
    while True:
        held, free = memory_now(ranks.device)
        peak = peak_of(trial, size, ranks.device)
        larger = min(2 * size, most)
        predicted = (peak - held) * larger / size
        if larger == size or not all(ranks.gather(predicted < ROOM * (free - reserved))):
            return Fit(size, peak / 2**30)
        size = larger


def peak_of(trial, size, device):
    """Bytes that this process held at most while trial(size) ran; on a CPU, since it started."""
    if device.type != "cuda":
        trial(size)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    torch.cuda.reset_peak_memory_stats(device)
    trial(size)
    return torch.cuda.max_memory_allocated(device)


def first_step_bytes(engine):
    """Bytes that the first optimizer step adds: Adam's moments and a temporary, which only ZeRO-0 makes that late."""
    if engine.zero_optimization_stage() or engine.optimizer is None:
        return 0
    return 12 * sum(parameter.numel() for parameter in engine.module.parameters() if parameter.requires_grad)


def memory_now(device):
    """(bytes that this process holds, bytes that it may still take)."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        unused, card = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - held
        limit = torch.cuda.get_per_process_memory_fraction(device) * card
        return held, min(unused + cached, limit - held)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    lines = Path("/proc/meminfo").read_text().splitlines()
    [kibibytes] = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return held, kibibytes * 2**10 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def memory_peaks(device):
    """(GPU, host) peak in GiB of this process; None for the GPU on a CPU."""
    gpu = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return gpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
