"""Stop in good order: after the first SIGTERM or SIGINT what is in hand is finished and kept; the second ends the process at once."""

import os
import signal

import torch
import torch.distributed as dist

from cli import exits
from files import InputError


class Stop:
    """Listens from now on. asked() is a question to all ranks together: each must ask it equally often."""

    def __init__(self, ranks):
        self.ranks, self.signal = ranks, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)
        if "LAUNCH_COMMAND" in os.environ:  # launch.sh killed: as if it had told us
            exits.when_the_parent_ends(signal.SIGTERM)

    def hear(self, number, _):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if self.ranks.first:  # not print: the signal may have come in the middle of one
            os.write(2, f"{signal.Signals(number).name}: finishing what is in hand; once more stops at once\n".encode())

    def asked(self):
        """Whether any rank was told to stop; the same answer on every rank."""
        if self.ranks.world == 1:
            return self.signal is not None
        said = torch.tensor([self.signal is not None], dtype=torch.int32, device=self.ranks.device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)


def cannot_save(path, error, kept):
    """The InputError for a checkpoint that could not be saved."""
    return exits.cannot_write(path, error, kept)
