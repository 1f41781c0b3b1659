"""Tests of how a lack of memory is recognized and said: cli/out_of_memory.py.

bash tests/run.sh tests/test_out_of_memory.py
"""

import errno
import subprocess
import sys

import numpy as np
import pytest
import torch
from small import ROOT

from cli import exits, out_of_memory
from files import InputError

FULL_CARD = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.57 GiB of which 1.20 GiB is "
    "free. Process 4711 has 3.10 GiB memory in use. Including non-PyTorch memory, this process has 11.25 GiB memory in "
    "use. Of the allocated memory 10.90 GiB is allocated by PyTorch, and 120.00 MiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)
CUDA = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"


@pytest.fixture(autouse=True)
def no_pass(monkeypatch):
    monkeypatch.setattr(out_of_memory, "latest_pass", None)
    monkeypatch.setenv("LAUNCH_COMMAND", "bash launch.sh DS ")


def ask_torch():
    torch.empty(10**15)


def ask_numpy():
    np.ones(10**15)


def ask_python():
    bytearray(10**16)


def pin_memory():
    raise torch.AcceleratorError(CUDA)


def fails(error):
    def main():
        raise error

    return main


def wrapped():
    try:
        ask_torch()
    except RuntimeError as error:
        raise ValueError("a library's words") from error


def said_by(main, capsys, code=3):
    with pytest.raises(SystemExit) as end:
        exits.run(main)
    said = capsys.readouterr().err
    assert end.value.code == code and said.count("\n") == 1 and said.startswith("error"), said
    return said


@pytest.mark.parametrize(
    "main, words",
    [
        (ask_torch, "the host's memory ran out (3725290.30 GiB were asked for). Finished work is safe. Close other"),
        (ask_numpy, "the host's memory ran out (7.11 PiB were asked for)."),
        (ask_python, "the host's memory ran out. Finished"),
        (wrapped, "the host's memory ran out (3725290.30 GiB"),
        (fails(OSError(errno.ENOMEM, "Cannot allocate memory")), "the host's memory ran out. "),
        (fails(RuntimeError("std::bad_alloc")), "the host's memory ran out. "),
        (
            fails(RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)")),
            "the host's memory ran out",
        ),
        (pin_memory, 'page-locked memory ran out. Finished work is safe. Set "pin_memory" to false'),
        (fails(torch.AcceleratorError(CUDA)), "the card's memory ran out. "),
        (
            fails(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")),
            "the card's memory ran out",
        ),
        (fails(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")), "the card's memory ran out. "),
        (
            fails(RuntimeError("NCCL error: unhandled cuda error. Cuda failure 'out of memory'")),
            "the card's memory ran out",
        ),
        (
            fails(torch.OutOfMemoryError(FULL_CARD)),
            "the card's memory ran out (2.00 GiB were asked for, 1.20 GiB are free, of 15.57 GiB, this process holds "
            "11.25 GiB, other programs 3.10 GiB). Finished work is safe. Close other programs or make the job smaller",
        ),
    ],
)
def test_a_lack_of_memory_is_one_sentence(main, words, capsys):
    assert words in said_by(main, capsys)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EIO, "Input/output error"), KeyError("memory")])
def test_other_errors_are_not_hidden(error):
    with pytest.raises(type(error)):
        exits.run(fails(error))


def test_a_user_error_that_speaks_of_memory_stays_one(capsys):
    assert said_by(fails(InputError("x ran out of memory")), capsys, code=2) == "error: x ran out of memory\n"


@pytest.mark.parametrize(
    "tokens, device, error, words",
    [
        (1000, "cuda", torch.OutOfMemoryError(FULL_CARD), "bash launch.sh DS --tokens_per_forward 500\n"),
        (700, "cuda", torch.OutOfMemoryError(FULL_CARD), "bash launch.sh DS --tokens_per_forward 400\n"),
        (400, "cuda", torch.OutOfMemoryError(FULL_CARD), "A forward pass holds the longest row alone: use --gradient"),
        (1000, "cuda", MemoryError(), "Close other programs or make the job smaller"),  # half would not help the host
        (1000, "cpu", MemoryError(), "bash launch.sh DS --tokens_per_forward 500\n"),
    ],
)
def test_half_the_tokens_are_proposed(tokens, device, error, words, capsys):
    """The longest row has 400: never fewer."""
    out_of_memory.note_pass(tokens, 400, device)
    assert words in said_by(fails(error), capsys)


def test_a_rank_that_runs_out_of_memory_says_so(monkeypatch, capsys):
    """The others wait for it in a collective, so that it must speak for itself."""
    monkeypatch.setenv("RANK", "1")
    assert said_by(fails(MemoryError()), capsys).startswith("error (rank 1): the host's memory ran out. ")


def test_no_heavy_import():
    code = "import sys; from cli import out_of_memory; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
