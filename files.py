"""Reading and writing files safely: one error class, atomic writes, locks, JSON with a digest, fingerprints.

Everything on disk is written to a temporary name, then renamed: a file is complete or absent, never half-written.
"""

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

# What writers say of a full disk, a quota or a limit on the size of files, where they raise no OSError with a number:
# the system, the Hub's client, numpy, torch, safetensors.
FULL = (
    *("No space left", "Not enough disk space", "quota exceeded", "File too large"),
    *(" requested and ", "PytorchStreamWriter", "unexpected pos", "iostream error"),
)


class InputError(Exception):
    """A user's error in one sentence: what, where, what was expected, what to run. Commands print it and exit with 2.

    local: only this rank has the error, so this rank prints it. Otherwise all ranks have it, and rank 0 prints it.
    """

    code = 2

    def __init__(self, sentence, local=False):
        super().__init__(sentence)
        self.local = local


# --- writing ---


@contextlib.contextmanager
def replacing(path, mode="w"):
    """Open a temporary file beside `path`. It is renamed to `path` if the block ends without an exception."""
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with naming(path), os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        by_umask(name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def by_umask(path):
    """Give the file at `path` the permissions of a new file: 0o666 without the umask's. Some writers make it 0o600."""
    os.umask(umask := os.umask(0))
    os.chmod(path, 0o666 & ~umask)


@contextlib.contextmanager
def naming(path):
    """Inside, a write that finds the disk full raises an OSError that names a file, whatever library writes."""
    try:
        yield
    except Exception as error:
        full = room_error(error)
        if not full:
            raise
        number, name = getattr(full, "errno", None), getattr(full, "filename", None)
        raise OSError(number or errno.ENOSPC, quoted(full), name or str(path)) from None


def room_error(error):
    """The failed write for want of disk space that `error` is, or that a library wrapped into it; None if none is."""
    return wrapped(error, no_room)


def wrapped(error, is_wanted):
    """`error`, or the error that a library wrapped into it, for which is_wanted(error); None if there is none.

    An InputError ends the search: it was raised for its own reason.
    """
    while error and not isinstance(error, InputError):
        if is_wanted(error):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def no_room(error):
    """Whether a write failed because the disk is full, by its number or the writer's words.

    Never true of an InputError, whose words are ours and may quote anything.
    """
    if isinstance(error, InputError):
        return False
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(words in str(error) for words in FULL)


def quoted(error):
    """What the system or the writer says of a failed write, on one line. Of a long text, the part that matters."""
    system = getattr(error, "strerror", None)
    if system:
        return system
    text = " ".join(str(error).split())
    place = max(0, next((text.find(words) for words in FULL if words in text), 0))
    start = max(0, place - 200)  # the place that is full stands before or after these words
    return text[start : place + 150]


@contextlib.contextmanager
def replacing_folder(folder):
    """The name of a temporary folder beside `folder`, not yet made. Renamed to `folder` if the block ends normally."""
    folder = Path(folder)
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with naming(folder):
            yield work
        for path in work.rglob("*"):
            if path.is_file():
                by_umask(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(work, folder)


# --- locks ---


def hold(path):
    """Lock the file at `path`. Returns the open file, or None if another process has it. Closing or exiting unlocks."""
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
    """Which process holds the lock at `path`."""
    return Path(path).read_text(encoding="utf-8") or "a process that just started"


def wait_for(path, what):
    """Like hold(), but wait until it succeeds. what: what the other process makes, for the message."""
    file = hold(path)
    if not file:
        print(f"waiting: {owner(path)} is working on {what}", flush=True)
    while not file:
        time.sleep(0.2)
        file = hold(path)
    return file


# --- outputs are checked before the work begins ---


def check_new(path):
    """Refuse an output file or folder that exists already, or that could not be written when the work is done."""
    if os.path.lexists(path):
        raise InputError(f"{path}: exists already; remove it or name another")
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent  # folders between will be made
    if why := not_writable(path, folder):
        raise InputError(f"{path}: cannot be written ({why}: {folder}); name a path in another folder")


def not_writable(path, folder, make=False):
    """Why `path` could not be written in `folder` later; None if it could. A file of one byte is tried.

    make: make the folder first. A full disk is an OSError that names `path`.
    """
    try:
        with naming(path):
            if make:
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        if no_room(error):
            raise
        return error.strerror


def check_out(path):
    """Refuse a file --out that could not be written when the work is done."""
    if why := not_writable(path, Path(path).parent):
        raise InputError(f"--out is {path}; expected a file in an existing folder that can be written to ({why})")
    if Path(path).is_dir():
        raise InputError(f"--out is {path}, a folder; expected a file")


# --- JSON, arrays, fingerprints ---


def write_json(path, value):
    """Write a JSON value in replacing()."""
    with replacing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def sealed(value):
    """A JSON object with a digest of its other fields added, so that unharmed() notices a flipped bit."""
    value = {name: each for name, each in value.items() if name != "digest"}
    return value | {"digest": fingerprint(json.loads(json.dumps(value)))}


def read_sealed(path, mend):
    """read_json() of an object that was sealed() when it was written."""
    return unharmed(read_json(path, mend), path, mend)


def unharmed(value, path, mend):
    """`value`, which was read at `path`, if its digest is right; InputError naming `mend` if not."""
    if value != sealed(value):
        raise InputError(f"{path}: is not as it was written; make it again with: {mend}")
    return value


def write_array(path, array):
    """np.save() in replacing()."""
    with replacing(path, "wb") as file:
        np.save(file, array)


def read_json(path, mend):
    """The JSON object at `path`. If it is none: InputError naming `mend`, the command that makes the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); make it with: {mend}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; make it again with: {mend}")
    return value


def fingerprint(*parts):
    """Hex digest (16 characters) of strings, bytes, arrays and JSON values, in order."""
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
    """Hex digest of a whole file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_array(path, mend):
    """The .npy file at `path`, memory-mapped. If it is damaged: InputError naming `mend`, the command that makes it."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise InputError(f"{path}: cannot be read as an array ({error}); make it again with: {mend}") from None


def shorten(text, most):
    """`text`, cut after `most` characters."""
    return text if len(text) <= most else text[:most] + "..."


def each_once(pairs):
    """json's object_pairs_hook that refuses a key that occurs twice: Python would silently take the last value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {json.dumps(shorten(twice, 40))} occurs twice in one object")
    return value
