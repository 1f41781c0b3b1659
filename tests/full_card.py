"""Run a command of ours on a card whose memory is full at one moment.

    python tests/full_card.py AT AFTER train_dpo.py [ARGUMENT...]

AT: "forward" (also of a recomputation) or "backward", in the middle of a block, whose weights are gathered; "step", at
the end of an optimizer step; "kill", as forward, but by the system's SIGKILL. AFTER: so many others before it.
"""

import functools
import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models import llada
from training import engine

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.57 GiB."


class Card:
    """Stands in for two functions, and counts what they do."""

    def __init__(self, at, after):
        self.at, self.after, self.asked = at, after, 0
        self.rotate, self.step = llada.rotate, engine.step
        llada.rotate, engine.step = self.rotated, self.stepped

    def ask(self, at, *_):
        if at != self.at.replace("kill", "forward"):
            return
        self.asked += 1
        if self.asked == self.after + 1:
            if self.at == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError(FULL)

    def rotated(self, *given):
        self.ask("forward")
        made = self.rotate(*given)
        if made.requires_grad:
            made.register_hook(functools.partial(self.ask, "backward"))
        return made

    def stepped(self, policy):
        norm = self.step(policy)
        self.ask("step")  # with weights that are changed already
        return norm


def main(at, after, script, *argv):
    Card(at, int(after))
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
