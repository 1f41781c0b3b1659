"""Memory that this process holds and may take, and the largest forward pass that fits."""

import contextlib
import math
import os
import resource
from pathlib import Path
from typing import NamedTuple

import torch

from cli import out_of_memory

ROOM = 0.8  # the share of free memory that a trial may plan to fill
TRIALS = 5  # at most
STEP = 4  # a trial has at most so many times the tokens of the one before: further ahead the prediction is poor
WORTH = 1.1  # another trial must be predicted to fit so many times the tokens
CGROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Fit(NamedTuple):
    """What largest_that_fits() found."""

    size: int  # tokens of one forward pass
    peak_gib: float  # of this rank, in its last trial


def largest_that_fits(first, most, trial, ranks, reserved=0):
    """The largest number of tokens of a forward pass that fits on every rank: a Fit.

    first: tokens of the longest row, the least that must fit. most: the largest number of use. trial(tokens): do the
    work once, with a multiple of `first`. reserved: bytes to leave free.

    Memory is predicted from the line through the last two trials, because a part of it, such as gathered weights, does
    not grow. A size that is predicted not to fit is never tried: under ZeRO-3 an out-of-memory error inside backward
    cannot be recovered.
    """
    tried, tokens = [(0, memory_now(ranks.device)[0])], first  # [(tokens, bytes at the peak)] of this rank
    while True:
        out_of_memory.note_pass(tokens, first, ranks.device.type)
        tried.append((tokens, peak_of(trial, tokens, ranks.device)))
        held, free = memory_now(ranks.device)
        fits = min(ranks.gather(fitting(tried, held + ROOM * (free - reserved), most)))
        further = min(fits, (2 if tokens == first else STEP) * tokens) // first * first
        if len(tried) > TRIALS or further < WORTH * tokens:
            return Fit(max(first, min(fits, tokens + first - 1)), tried[-1][1] / 2**30)
        tokens = further


def fitting(tried, limit, most):
    """The largest number of tokens, up to `most`, whose peak is predicted to be at most `limit` bytes.

    tried: [(tokens, bytes at the peak)], first (0, bytes held before). After one trial, all that it added is taken to
    grow with the tokens, which predicts too much rather than too little.
    """
    (fewer, low), (tokens, high) = tried[-2:]
    slope = (high - low) / (tokens - fewer)
    if slope <= 0:  # what grows is hidden below what does not
        return most if high <= limit else fewer
    return min(most, int(tokens + (limit - high) / slope))


def peak_of(trial, tokens, device):
    """Bytes that this process held at most while trial(tokens) ran."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of blocks of another trial's sizes
        torch.cuda.reset_peak_memory_stats(device)
        trial(tokens)
        return torch.cuda.max_memory_allocated(device)
    forget_host_peak()
    trial(tokens)
    return host_peak()


def host_peak():
    """Bytes of host memory that this process held at most since its start, or since forget_host_peak()."""
    return 2**10 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


forgotten_peak = 0  # bytes: the largest host peak that forget_host_peak() reset


def forget_host_peak():
    """Let the host peak of this process start again from what it holds now. memory_peaks() still knows the largest."""
    global forgotten_peak
    forgotten_peak = max(forgotten_peak, host_peak())
    with contextlib.suppress(OSError):  # in a sandbox without this file the peak stays that since the start
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM, which is ru_maxrss


def first_step_bytes(engine):
    """Bytes that the first optimizer step adds: Adam's moments and a temporary, which only ZeRO-0 makes that late."""
    if engine.zero_optimization_stage() or engine.optimizer is None:
        return 0
    return 12 * sum(parameter.numel() for parameter in engine.module.parameters() if parameter.requires_grad)


def memory_now(device):
    """(bytes that this process holds, bytes that it may still take, after what other programs hold)."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        unused, card = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - held
        limit = torch.cuda.get_per_process_memory_fraction(device) * card
        return held, min(unused + cached, limit - held)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    lines = Path("/proc/meminfo").read_text().splitlines()
    [kibibytes] = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    free = min([kibibytes * 2**10, *free_in_cgroups()])
    return held, free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_in_cgroups():
    """[bytes that may still be taken] of each of limited_cgroups().

    Pages of files count as free, as in MemAvailable: the kernel gives them up first.
    """
    free = []
    for folder, most in limited_cgroups().items():
        used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        of_files = int(used["active_file"]) + int(used["inactive_file"])
        free.append(most - int((folder / "memory.current").read_text()) + of_files)
    return free


def limited_cgroups():
    """{folder: bytes} of each control group (version 2) above this process that has a limit."""
    lines = OWN_GROUP.read_text().splitlines()
    group = CGROUPS.joinpath(*[line.removeprefix("0::/") for line in lines if line.startswith("0::/")])
    limits = {folder: folder / "memory.max" for folder in (group, *group.parents)}
    texts = {folder: limit.read_text().strip() for folder, limit in limits.items() if limit.is_file()}
    return {folder: int(text) for folder, text in texts.items() if text != "max"}


def host_bytes():
    """Memory of this machine, or of WSL's share of it, or what the container or job may use if that is less."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limited_cgroups().values(), math.inf)


def memory_peaks(device):
    """(GPU, host) peak in GiB of this process; None for the GPU on a CPU."""
    gpu = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return gpu, max(forgotten_peak, host_peak()) / 2**30
