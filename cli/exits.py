"""How a command ends: exit code 0, 2 with one sentence for a user's error, 130 for Ctrl-C.

A command calls run(main) last. Before its heavy imports it calls early(arguments), so that --help and every mistake
in the arguments are answered in a fraction of a second.
"""

import os
import shlex
import sys

from files import InputError, no_room, why


def early(check):
    """Call check(), which reads a command's arguments, before torch is imported. A user's error ends the process."""
    try:
        check()
    except Exception as error:
        end_with(error)


def end_if(reason):
    """End the process with exit code 0 if there is a `reason` why nothing is to be done. Say it, once for all ranks."""
    if reason is None:
        return
    if reason and first_rank():
        print(reason, flush=True)
    sys.exit(0)


def first_rank():
    """Whether this process is alone, or the first of several that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def run(main):
    """Call a command's main() and exit with its code."""
    try:
        code = main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        end_with(error)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Skip destructors: torch's threads sometimes abort there, which looks like a failure of a finished job.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def end_with(error):
    """Print a user's error once for all ranks, or for this rank alone if no other has met it; exit code 2.

    Any other error is raised again.
    """
    if no_room(error):
        error = without_room(error)
    elif not isinstance(error, InputError):
        raise error
    if first_rank() or error.local:
        speaker = "error" if first_rank() else f"error (rank {os.environ['RANK']})"
        print(f"{speaker}: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def without_room(error):
    """The sentence of a write that failed for want of room."""
    name = getattr(error, "filename", None) or "a file"  # of a writer that is not within naming()
    return InputError(
        f"{name}: cannot be written ({why(error)}); what was finished before is whole; make room, and go on with: "
        f"{command()}",
        local=True,
    )


def command():
    """The command line that started this process, or the launch.sh that did."""
    return os.environ.get("LAUNCH_COMMAND", "").strip() or shlex.join(["python", *sys.argv])
