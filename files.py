"""What every file on disk relies on: one error class, atomic writes, locks, fingerprints, sealed JSON."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np


class InputError(Exception):
    """A user's error in one sentence: what, where, what was expected, what to run. Scripts print it and exit 2.

    local: only this rank has met it, so this rank must say it; else every rank has, and rank 0 speaks.
    """

    def __init__(self, sentence, local=False):
        super().__init__(sentence)
        self.local = local


@contextlib.contextmanager
def replacing(path, mode="w"):
    """Open a temporary neighbour of `path`; renamed over it when the block ends without an exception."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with naming(path), os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def naming(path):
    """A write inside that finds no room is an OSError with a number and the name of a file, whoever's writer it was."""
    try:
        yield
    except Exception as error:
        if not (full := room_error(error)):
            raise
        number, name = (getattr(full, field, None) for field in ("errno", "filename"))
        raise OSError(number or errno.ENOSPC, why(full), name or str(path)) from None


def room_error(error):
    """The failed write for want of room that `error` is, or that a library wrapped into it; None if there is none."""
    while error and not isinstance(error, InputError) and not no_room(error):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error if error and no_room(error) else None


def why(error):
    """What the system says of a failed write, or else its writer, on one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:150]


def no_room(error):
    """Whether a write failed for want of room, of quota, or at the limit of a file's size: as the system says it, or numpy's,
    safetensors' or torch's writer in its own words. Not what we say ourselves, which may quote anything."""
    return not isinstance(error, InputError) and (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        or any(
            words in str(error)
            for words in (
                "No space left",
                "Not enough disk space",
                "quota exceeded",
                "File too large",
                " requested and ",
                "PytorchStreamWriter",
                "unexpected pos",
                "iostream error",
            )
        )
    )


@contextlib.contextmanager
def replacing_folder(folder):
    """A temporary neighbour of `folder`, not yet made; renamed over it when the block ends without an exception."""
    folder = Path(folder)
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with naming(folder):
            yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(work, folder)


def hold(path):
    """The lock file at `path`, open and ours until it is closed or this process ends, however it ends; None if another's."""
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    with naming(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


def owner(path):
    """Who holds a lock."""
    return Path(path).read_text(encoding="utf-8") or "a process that just started"


def wait_for(path, what):
    """hold(), waited for: the other makes the same."""
    said = False
    while not (file := hold(path)):
        if not said:
            print(f"waiting: {owner(path)} is at work on {what}", flush=True)
        said = True
        time.sleep(0.2)
    return file


def check_new(path):
    """Refuse an output file or folder that exists already, or that could not be written when the work is done."""
    if os.path.lexists(path):
        raise InputError(f"{path}: exists already; remove it or name another")
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent  # folders between will be made
    try:
        with naming(path):
            try_writing(folder)
    except OSError as error:
        if no_room(error):
            raise
        raise InputError(
            f"{path}: cannot be written ({error.strerror}: {folder}); name a path in another folder"
        ) from None


def try_writing(folder):
    """Write a file of one byte in `folder`, and remove it: an OSError now instead of after hours of work."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())


def check_out(path):
    """Refuse a file --out that could not be written when the work is done."""
    try:
        with naming(path):
            try_writing(Path(path).parent)
    except OSError as error:
        if no_room(error):
            raise
        raise InputError(
            f"--out is {path}; expected a file in an existing folder that can be written to ({error.strerror})"
        ) from None
    if Path(path).is_dir():
        raise InputError(f"--out is {path}, a folder; expected a file")


def write_json(path, value):
    with replacing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def sealed(value):
    """A JSON object with a digest of the rest of it, so that a flipped bit is noticed."""
    value = {name: each for name, each in value.items() if name != "digest"}
    return value | {"digest": fingerprint(json.loads(json.dumps(value)))}


def read_sealed(path, mend):
    """read_json() of an object that was written sealed()."""
    return unharmed(read_json(path, mend), path, mend)


def unharmed(value, path, mend):
    """`value`, read at `path`, if it is as it was sealed()."""
    if value != sealed(value):
        raise InputError(f"{path}: is not as it was written; make it again with: {mend}")
    return value


def write_array(path, array):
    with replacing(path, "wb") as file:
        np.save(file, array)


def read_json(path, mend):
    """The JSON object at `path`; InputError naming `mend`, the command that makes the file, if it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); make it with: {mend}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; make it again with: {mend}")
    return value


def fingerprint(*parts):
    """Hex digest of 16 characters over strings, bytes, arrays and JSON values, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            data = np.ascontiguousarray(part).tobytes()
        else:
            data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_array(path, mend):
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # what a flipped bit in a header makes numpy raise is of many kinds
        raise InputError(f"{path}: cannot be read as an array ({error}); make it again with: {mend}") from None


def shorten(text, most):
    """`text`, cut after `most` characters."""
    return text if len(text) <= most else text[:most] + "..."


def each_once(pairs):
    """An object of distinct keys: of two responses under one name Python would take the last, without a word."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {json.dumps(shorten(twice, 40))} stands twice in one object")
    return value
