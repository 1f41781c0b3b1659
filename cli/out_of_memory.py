"""Out of memory, on the card or the host: how it is recognized, and the sentence with which a command ends.

torch is not imported here. An error is known by its class and its words: those of torch 2.13 (alloc_cpu.cpp,
CUDACachingAllocator.cpp), of CUDA's libraries, numpy and the system.

launch.sh --on_oom smaller starts a job again with half the tokens in a forward pass. It reads them in the file that
LAUNCH_PASS names, where note_pass() writes them: a process that the kernel kills cannot say anything more.
"""

import errno
import os
import re
import traceback
from pathlib import Path
from typing import NamedTuple

from files import InputError, wrapped

# "out of memory": torch.OutOfMemoryError, "CUDA error: out of memory", NCCL's "Cuda failure 'out of memory'"
WORDS = ("out of memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "_ALLOC_FAILED")
HOST_WORDS = WORDS[1:4]
GIB = 2**30
CARD, HOST, PAGE_LOCKED = "the card's memory", "the host's memory", "page-locked memory"


class OutOfMemory(InputError):
    """Memory ran out: one sentence, exit code 3. Only this rank has it: the others wait for it until they are ended."""

    code = 3

    def __init__(self, sentence):
        super().__init__(sentence, local=True)


class Pass(NamedTuple):
    """The forward pass that a job makes."""

    tokens: int  # at most
    least: int  # tokens of the longest row
    device: str  # "cuda" or "cpu"

    @property
    def half(self):
        """Half the tokens, but the longest row at least; None if it is the longest row alone."""
        return max(self.tokens // 2, self.least) if self.tokens > self.least else None


latest_pass = None  # of this process


def note_pass(tokens, least, device):
    """Remember the forward pass that this process makes from now on, also for launch.sh."""
    global latest_pass
    latest_pass = Pass(tokens, least, device)
    if path := os.environ.get("LAUNCH_PASS"):
        Path(path).write_text(f"{latest_pass.half}\n" if latest_pass.half else "")


def cause(error):
    """The lack of memory that `error` is, or that a library wrapped into it; None if it is none."""
    return wrapped(error, is_lack_of_memory)


def is_lack_of_memory(error):
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def ended(error, kept, command):
    """The OutOfMemory for a lack of memory. kept: what is saved, without a full stop. command: to go on."""
    place, said = place_of(error), details(str(error))
    numbers = f" ({said})" if said else ""
    return OutOfMemory(f"{place} ran out{numbers}. {kept}. {mend(place, command)}")


def place_of(error):
    """Which memory ran out."""
    if isinstance(error, (MemoryError, OSError)) or any(words in str(error) for words in HOST_WORDS):
        return HOST
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    if any("pin_memory" in f"{frame.name} {frame.line}" for frame in frames):
        return PAGE_LOCKED
    return CARD


def details(text):
    """How much was asked for and held, as far as the error's text says it."""
    if found := re.search(r"you tried to allocate (\d+) bytes", text):
        return f"{int(found[1]) / GIB:.2f} GiB were asked for"
    size, parts = r"([\d.]+ [KMGTP]?i?B|[\d.]+ bytes)", []
    for pattern, words in (
        (rf"(?:Tried|Unable) to allocate {size}", "{} were asked for"),
        (rf"of which {size} is free", "{} are free"),
        (rf"total capacity of {size}", "of {}"),
        (rf"this process has {size} memory in use", "this process holds {}"),
        (rf"(?<!this )[Pp]rocess \d+ has {size} memory in use", "other programs {}"),
    ):
        if found := re.findall(pattern, text):
            parts.append(words.format(" + ".join(found)))
    return ", ".join(parts)


def mend(place, command):
    """What to change, and the command to run then."""
    if place == PAGE_LOCKED:
        return f'Set "pin_memory" to false in a copy of the ds_config, or use --load_in_4bit true, then run: {command}'
    if latest_pass is None or (place == HOST and latest_pass.device != "cpu"):
        return f"Close other programs or make the job smaller (docs/troubleshooting.md, Memory), then run: {command}"
    if latest_pass.half is None:
        return (
            "A forward pass holds the longest row alone: use --gradient_checkpointing true, a smaller --max_length or "
            f"what python plan.py proposes, then run: {command}"
        )
    return (
        "Close other programs, or halve the tokens of a forward pass (sums then differ in their last digits): "
        f"{command} --tokens_per_forward {latest_pass.half}"
    )
