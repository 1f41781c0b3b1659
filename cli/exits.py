"""How a command ends: exit code 0, 2 with one sentence for a user's error, 3 where memory ran out, 130 for Ctrl-C.

A command calls run(main) last. Above its heavy imports it calls early(check), which reads the arguments, so that
--help, mistakes and "up to date" are answered in a fraction of a second.
"""

import contextlib
import ctypes
import os
import shlex
import sys
import traceback

from cli import out_of_memory
from files import InputError, quoted, room_error, wrapped


def early(check):
    """Call check() before torch is imported. A user's error ends the process; otherwise it goes on."""
    flushed(check)


def run(main):
    """Call a command's main() and exit with its code."""
    try:
        code = flushed(main)
    except SystemExit as end:
        code = end.code
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code or 0)  # skip destructors: torch's threads sometimes abort there, which looks like a failure
    sys.exit(code)


def flushed(function):
    """function()'s result, after all output is written. A user's error or Ctrl-C ends the process."""
    try:
        try:
            return function()
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
                stream.flush()
    except BrokenPipeError:  # who reads our output has gone, such as `head`
        close_stdout()
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        if wrapped(error, is_interrupt):
            print("stopped", file=sys.stderr, flush=True)
            sys.exit(130)
        end_with(error)


def is_interrupt(error):
    """Whether an error is Ctrl-C. Python 3.11 wraps one that comes while a class body runs __set_name__()."""
    return isinstance(error, KeyboardInterrupt)


def end_if(reason):
    """End the process with exit code 0 if there is a `reason` to do nothing. Print it, unless it is empty."""
    if reason is None:
        return
    if reason and first_rank():
        print(reason, flush=True)
    sys.exit(0)


def first_rank():
    """Whether this process is alone, or the first of several that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def end_with(error):
    """Print a user's error once for all ranks, or for this rank alone if no other has it, and exit with its code.

    Any other error is raised again, unless memory or disk space ran out.
    """
    lack, full = out_of_memory.cause(error), room_error(error)
    if lack:
        error = out_of_memory.ended(lack, "Finished work is safe", command())
    elif full:
        if not isinstance(full, OSError):  # a library's: its traceback shows what it was doing
            traceback.print_exception(error)
        error = without_room(full)
    elif not isinstance(error, InputError):
        raise error
    if first_rank() or error.local:
        speaker = "error" if first_rank() else f"error (rank {os.environ['RANK']})"
        with contextlib.suppress(OSError):  # stderr may be on the full disk, too
            print(f"{speaker}: {error}", file=sys.stderr, flush=True)
    sys.exit(error.code)


def without_room(error):
    """The InputError for a write that failed because the disk is full."""
    name = getattr(error, "filename", None)
    if not name:  # not written inside files.naming()
        name = "standard output" if stdout_is_full() else "a file"
    return cannot_write(name, error, "Finished work is safe")


def stdout_is_full():
    """Whether standard output cannot be written."""
    try:
        print(flush=True)
    except OSError:
        close_stdout()
        return True
    return False


def close_stdout():
    """Send what is still to be written to standard output nowhere, so that Python does not fail on it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cannot_write(path, error, kept):
    """The InputError for a failed write to `path`. kept: what is safe, a sentence without its full stop."""
    said = f"{path}: cannot be written ({quoted(error)}). {kept}. Free some disk space, then run: {command()}"
    return InputError(said, local=True)


def command():
    """The command line that started this process, or the launch.sh that did."""
    return os.environ.get("LAUNCH_COMMAND", "").strip() or shlex.join(["python", *sys.argv])


def when_the_parent_ends(number):
    """Have the system send this process a signal when the one that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG of linux/prctl.h
