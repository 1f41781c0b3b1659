"""Tests of the largest forward pass that fits, against a model of memory, and of what is read from the system.

bash tests/run.sh tests/training/test_memory.py
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cli import out_of_memory
from training import memory

CPU = torch.device("cpu")


class Machine:
    """One rank's memory as memory.py sees it: `held` before, and a pass that adds peak(tokens) bytes."""

    def __init__(self, monkeypatch, peak, free, held=0, others=()):
        """others: what the other ranks offer to gather(), of a list of the sizes tried so far."""
        self.tried, self.peak, self.held, self.free = [], peak, held, free
        self.ranks = SimpleNamespace(device=CPU, gather=lambda mine: [mine, *(other(self.tried) for other in others)])
        monkeypatch.setattr(memory, "memory_now", lambda device: (held, free))
        monkeypatch.setattr(memory, "peak_of", lambda trial, tokens, device: trial(tokens) or held + peak(tokens))
        monkeypatch.setattr(out_of_memory, "latest_pass", None)

    def trial(self, tokens):
        assert self.peak(tokens) <= self.free, f"out of memory at {tokens} after {self.tried}"
        self.tried.append(tokens)

    def fit(self, first, most, reserved=0):
        return memory.largest_that_fits(first, most, self.trial, self.ranks, reserved)


def line(fixed, each):
    """The bytes of a pass: a fixed part, such as gathered weights, and so many for each token."""
    return lambda tokens: fixed + each * tokens


@pytest.mark.parametrize(
    "fixed, each, free, most, want, tried",
    [
        (0, 10, 10_000, 10**6, 800, [100, 200, 800]),  # 0.8 of what is free
        (0, 10, 10_700, 10**6, 856, [100, 200, 800]),  # less than a row more than was tried
        (2000, 10, 12_000, 10**6, 760, [100, 200, 700]),  # the fixed part is not multiplied: in proportion it were 480
        (2000, 10, 7000, 10**6, 186, [100]),  # in proportion, two rows would not fit
        (0, 10, 10**9, 500, 500, [100, 200, 500]),  # no more than there is
        (0, 10, 10**9, 105, 105, [100]),
        (0, 10, 10**9, 50, 100, [100]),  # the longest row is more than that
        (0, 10, 1200, 10**6, 100, [100]),  # the first leaves no room
        (0, 10, 10**9, 10**6, 12899, [100, 200, 800, 3200, 12800]),  # five trials, each at most four times the last
    ],
)
def test_largest_that_fits(monkeypatch, fixed, each, free, most, want, tried):
    machine = Machine(monkeypatch, line(fixed, each), free, held=77)
    found = machine.fit(100, most)
    assert found.size == want and machine.tried == tried
    assert found.peak_gib == (77 + fixed + each * tried[-1]) / 2**30


def test_a_peak_that_does_not_grow():
    """It says nothing of how much more fits: as much as is of use, or the size before if it is too high already."""
    assert memory.fitting([(100, 500), (200, 490)], 600, 10**6) == 10**6
    assert memory.fitting([(100, 500), (200, 490)], 480, 10**6) == 100


def test_memory_is_kept_for_later(monkeypatch):
    """`reserved` bytes are left free: those of the optimizer's first step."""
    assert Machine(monkeypatch, line(0, 10), 10_000).fit(100, 10**6, reserved=5000).size == 400


def test_every_rank_makes_the_same_trials(monkeypatch):
    """The rank with the least memory decides. Each trial is a collective: another one of a single rank would hang."""
    poorer = {1: 250, 2: 400, 3: 390}

    def other(tried):
        return poorer[len(tried)]

    machine = Machine(monkeypatch, line(0, 10), 10**6, others=[other])
    assert machine.fit(100, 10**6).size == 390 and machine.tried == [100, 200, 400]


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_hidden_growth(monkeypatch, seed):
    """With peaks off by 2%, and what grows hidden below another peak, no trial runs out of memory."""
    draw = random.Random(seed)
    fixed, each, hidden = draw.uniform(0, 5000), draw.uniform(1, 20), draw.uniform(0, 5000)

    def peak(tokens):
        return max(hidden, fixed + each * tokens) * draw.uniform(0.98, 1.02)

    free = draw.uniform(1.3, 20) * max(hidden, fixed + each * 100)
    machine = Machine(monkeypatch, peak, free)
    found = machine.fit(100, 10**6)
    assert fixed + each * found.size < 0.95 * free
    further = min(0.8 * free - fixed, each * 12800) / each  # what could be had in five trials
    assert found.size >= 100 and (2.5 * peak(100) > free or hidden > fixed + each * 200 or found.size > 0.6 * further)


def test_a_trial_that_runs_out_of_memory_is_noted(monkeypatch, tmp_path):
    """launch.sh reads half of the tokens of a pass that the system killed; the longest row has no half."""
    monkeypatch.setenv("LAUNCH_PASS", str(tmp_path / "pass"))
    machine, said = Machine(monkeypatch, line(0, 10), 10_000), []
    run = machine.trial

    def trial(tokens):
        said.append((tmp_path / "pass").read_text())
        run(tokens)

    machine.trial = trial
    machine.fit(100, 10**6)
    assert said == ["", "100\n", "400\n"]


# --- the system -------------------------------------------------------------------------------------------


def test_memory_now():
    """What is held grows by what is taken; what is free is within the machine."""
    held, free = memory.memory_now(CPU)
    block = np.ones(2**25)  # 256 MiB
    assert memory.memory_now(CPU)[0] - held == pytest.approx(block.nbytes, rel=0.1)
    [total] = [int(line.split()[1]) << 10 for line in open("/proc/meminfo") if line.startswith("MemTotal")]
    assert 0 < free < total


def test_a_peak_on_a_cpu_is_of_the_trial_alone():
    """Not hidden below an earlier peak, which the log still knows."""
    before = np.ones(2**26)  # 512 MiB, as while a model is loaded
    del before
    held, _ = memory.memory_now(CPU)
    for size in (2**24, 2**25):
        peak = memory.peak_of(np.ones, size, CPU)
        assert peak - held == pytest.approx(8 * size, rel=0.1)
    assert memory.memory_peaks(CPU)[1] > (held + 2**28) / 2**30


@pytest.mark.parametrize(
    "group, free", [("0::/job/step\n", 600), ("0::/job\n", 900), ("0::/\n", None), ("4:memory:/job/step\n", None)]
)
def test_limits_of_control_groups(monkeypatch, tmp_path, group, free):
    """Each group above counts. Pages of files are free; "max" is no limit."""
    limits = {"job/step": ("1000", 500, 100), "job": ("2000", 1200, 100), ".": ("max", 1300, 0)}
    for name, (most, current, of_files) in limits.items():
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(
            f"anon 1\nactive_file {of_files // 4}\ninactive_file {of_files - of_files // 4}\n"
        )
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    (tmp_path / "cgroup").write_text(group)
    monkeypatch.setattr(memory, "OWN_GROUP", tmp_path / "cgroup")
    assert min(memory.free_in_cgroups(), default=None) == free
    assert (memory.host_bytes() <= 2000) == (free is not None)  # plan.py's host
