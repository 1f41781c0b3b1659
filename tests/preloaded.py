"""A server that has imported torch, transformers and DeepSpeed, and forks one process for each command under test.

    python tests/preloaded.py serve FOLDER               started by Server, once per pytest worker
    python tests/preloaded.py run FOLDER [ARGUMENT...]   FOLDER/bin/python: a python that asks the server

A fresh process spends five seconds on these imports. A forked one starts at once, and is otherwise like a fresh one: it
has its own session, arguments, environment, folder and standard streams, imports our modules itself, and may be
signalled and killed.

    client --(socket: request, stdin, stdout, stderr)--> server --(fork)--> keeper --(fork)--> the command
           <--(socket: pid, then wait status)----------------------------- keeper

The keeper ends with the command, and kills it when the client is gone.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

# What our commands import from others, except what starts threads, which do not survive a fork (pyarrow does).
IMPORTS = (
    "torch.utils.tensorboard",
    "torch.utils.cpp_extension",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
    "deepspeed",
    "jsonlines",
    "sentencepiece",
    "safetensors.torch",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "lm_eval.api.model",
)
# The first letters of variables that Python and these modules read while they start.
READ_AT_START = ("CUDA_", "DS_", "HF_", "HOME", "HUGGINGFACE", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "ONEDNN_")
READ_AT_START += ("PYTHON", "TORCH_", "TRANSFORMERS_", "XDG_")
READ_LATER = {"PYTHONUNBUFFERED"}
INTEGER = 8  # bytes of a number on the socket
ORPHAN = b"o"  # what a client sends when its parent has ended
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


# --- the server and what it forks -------------------------------------------------------------------------


def serve(folder):
    """Answer requests until stdin is closed, then exit. Returns only in the processes of requests, with theirs."""
    import cpuinfo

    for name in IMPORTS:
        with contextlib.suppress(ImportError):  # of an optional requirement
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)  # DeepSpeed's Adam asks, which takes 1.5 s
    cpuinfo.get_cpu_info()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"
    gc.collect()
    gc.freeze()  # the collector of a child must not touch, and so copy, all these pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave no zombies
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "new"))
    listener.listen(128)
    os.rename(folder / "new", folder / "socket")  # ready
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            shutil.rmtree(folder)
            sys.exit()
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return keep(connection, folder)
        connection.close()


def keep(connection, folder):
    """Fork the command of one request and report on it. Returns the request in the command's process alone."""
    os.setsid()
    header, streams, _, _ = socket.recv_fds(connection, INTEGER, 3)
    request = json.loads(connection.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(request, streams)
        sys.executable = str(folder / "bin" / "python")  # for what the command starts itself
        return request
    for stream in streams:
        os.close(stream)
    send_number(connection, pid)
    ended = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([ended, connection], [], [])
        if ended in ready:
            with contextlib.suppress(OSError):
                send_number(connection, os.waitpid(pid, 0)[1])
            os._exit(0)
        said = connection.recv(1)
        if said != ORPHAN:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)  # of an orphan: the system sends the command the signal that it asked for, if any


def become(request, streams):
    """Make this process what a fresh one would be for the request."""
    os.setsid()
    for stream, fd in enumerate(streams):
        os.dup2(fd, stream)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.SIG_IGN if request["ignores_interrupts"] else signal.default_int_handler)
    sys.stdout.reconfigure(line_buffering=os.isatty(1) or "PYTHONUNBUFFERED" in os.environ)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    if threads > 1:
        sys.modules["torch"].set_num_threads(threads)
    sys.modules["numpy"].random.seed()
    importlib.invalidate_caches()
    if request["world"]:
        launch(request["world"])


def launch(world):
    """What torchrun does: fork `world` ranks and return in each; end with 1 as soon as one of them fails."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()})
            return
        ranks.append(pid)

    def to_all(number, _=None):
        for pid in ranks:
            os.kill(pid, number)

    signal.signal(signal.SIGTERM, to_all)
    signal.signal(signal.SIGINT, to_all)
    signal.signal(signal.SIGALRM, lambda *_: to_all(signal.SIGKILL))
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = True
            to_all(signal.SIGTERM)
            signal.alarm(30)
    os._exit(failed)


def run(words):
    """Run what stands after `python` on a command line: a script, -c CODE, -m MODULE or - (stdin), as __main__."""
    kind = words[0]
    sys.argv = words[1:] if kind in ("-c", "-m") else words
    if kind == "-m":
        sys.path[0] = os.getcwd()
        return runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    module = types.ModuleType("__main__")
    if kind in ("-c", "-"):
        sys.path[0], source, name = "", words[1] if kind == "-c" else sys.stdin.read(), "<string>"
        sys.argv = [kind, *words[2 if kind == "-c" else 1 :]]
    else:
        sys.path[0], source, name = str(Path(kind).resolve().parent), Path(kind).read_bytes(), kind
        module.__file__ = kind
    sys.modules["__main__"] = module
    exec(compile(source, name, "exec"), module.__dict__)


def finish(words):
    """run(), then end as Python does, but without freeing every object, which takes longer than most commands."""
    code = 0
    try:
        run(words)
    except SystemExit as end:
        if not isinstance(end.code, (int, type(None))):
            raise
        code = end.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # a full disk, or a reader that is gone: Python itself says so
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)
    sys.exit(code)


# --- clients ----------------------------------------------------------------------------------------------


def send_number(connection, number):
    connection.sendall(number.to_bytes(INTEGER, "big"))


def receive_number(connection):
    """The keeper's next number; None if it has ended."""
    data = connection.recv(INTEGER, socket.MSG_WAITALL)
    return int.from_bytes(data, "big") if data else None


def ask(folder, words, environment, working_folder, streams, world=None):
    """(connection to the keeper, pid) of a new process that runs `python WORDS...`, on `world` ranks if given."""
    request = {"words": words, "environment": environment, "folder": str(working_folder), "world": world}
    request["ignores_interrupts"] = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    data = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / "socket"))
    socket.send_fds(connection, [len(data).to_bytes(INTEGER, "big")], streams)
    connection.sendall(data)
    pid = receive_number(connection)
    assert pid, "the server of tests/preloaded.py could not fork"
    return connection, pid


def read_at_start(environment):
    """The variables that a forked process cannot change any more."""
    return {
        name: value for name, value in environment.items() if name.startswith(READ_AT_START) and name not in READ_LATER
    }


class Process(subprocess.Popen):
    """subprocess.Popen of `python WORDS...`, forked by a server. `args` is [sys.executable, *WORDS]."""

    def __init__(self, server, words, environment, world=None, **options):
        self.server, self.environment, self.world = server, environment, world
        super().__init__([sys.executable, *words], **options)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, *more):
        pipes = p2cread, _, _, c2pwrite, _, errwrite = more[4:10]
        streams = [given if given != -1 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        folder = cwd or os.getcwd()
        self.connection, self.pid = ask(self.server.folder, args[1:], self.environment, folder, streams, self.world)
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _try_wait(self, flags):
        if flags & os.WNOHANG and not select.select([self.connection], [], [], 0)[0]:
            return 0, 0
        status = receive_number(self.connection)
        self.connection.close()
        return self.pid, signal.SIGKILL if status is None else status

    def _internal_poll(self, *_, **__):
        if self.returncode is None and self._child_created:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


class Server:
    """Starts a server in `folder` and waits until it is ready. It ends with this process."""

    def __init__(self, folder, environment):
        self.folder, self.fixed = Path(folder), read_at_start(environment)
        log = self.folder / "log"
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "serve", folder],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        (self.folder / "fixed.json").write_text(json.dumps(self.fixed))
        (self.folder / "bin").mkdir()
        for name in ("python", "python3"):
            script = self.folder / "bin" / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} run {folder} "$@"\n')
            script.chmod(0o755)
        while not (self.folder / "socket").exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server of tests/preloaded.py has ended:\n{log.read_text()}")
            select.select([], [], [], 0.01)

    def serves(self, environment):
        """Whether a process with this environment may be forked: it changes nothing that was read at the start."""
        return read_at_start(environment) == self.fixed


def stand_in(folder, words):
    """Be `python WORDS...` for a shell script: ask the server, pass on signals, end as the command ends."""
    fixed = json.loads((folder / "fixed.json").read_text())
    plain = words and (words[0] in ("-c", "-m", "-") or not words[0].startswith("-"))
    inherits = "multiproc" in "".join(words[1:2])  # more open files than these three
    if not plain or inherits or read_at_start(os.environ) != fixed:
        os.execv(sys.executable, [sys.executable, *words])
    import ctypes

    connection, pid = ask(folder, words, dict(os.environ), os.getcwd(), [0, 1, 2])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.signal(signal.SIGUSR1, lambda *_: connection.send(ORPHAN))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    code = os.waitstatus_to_exitcode(receive_number(connection) or 0)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    what, place, *arguments = sys.argv[1:]
    if what == "run":
        stand_in(Path(place), arguments)
    finish(serve(Path(place))["words"])
