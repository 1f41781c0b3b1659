"""Stop in good order: the first SIGTERM or SIGINT finishes the pass in hand and saves, a second one stops at once."""

import os
import signal

import torch
import torch.distributed as dist

from cli import exits


class Stopped(Exception):
    """A signal asked this job to stop. Stop.check() raises it on every rank alike."""


class Stop:
    """Listens for signals from now on. asked() and check() communicate: every rank must call them equally often."""

    def __init__(self, ranks):
        self.ranks, self.signal = ranks, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)
        if "LAUNCH_COMMAND" in os.environ:  # if launch.sh is killed, stop as if it had sent the signal
            exits.when_the_parent_ends(signal.SIGTERM)

    def hear(self, number, _):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if self.ranks.first:  # not print: the signal may have interrupted one
            os.write(2, b"stopping: finishing the pass in hand and saving; a second signal stops at once\n")

    def asked(self):
        """Whether any rank has received a signal; the same answer on every rank."""
        if self.ranks.world == 1:
            return self.signal is not None
        heard = torch.tensor([self.signal is not None], dtype=torch.int32, device=self.ranks.device)
        dist.all_reduce(heard, dist.ReduceOp.MAX)
        return bool(heard)

    def check(self):
        """Raise Stopped if any rank has received a signal."""
        if self.asked():
            raise Stopped
