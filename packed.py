"""The arrays on disk: packed preferences and the reference's noise and scores. Written under a temporary name, renamed.

packed/            tokens.npy uint32 (tokens,), bounds.npy int64 (pairs, 4) = start, prompt end, chosen end, rejected end
                   (SFT data: the response is chosen, and rejected is empty),
                   meta.json (what they were made of), rejects.jsonl (rows left out, with reasons)
packed/ref-<key>/  noise-k.npy uint8 (response tokens, ceil(S/8)), ref_scores-k.npy float32 (pairs, 2, S), meta.json

S states, K noise sets. Response tokens are in file order: chosen then rejected, pair by pair.
"""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open

FORMAT = 2


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
        if not no_room(error):
            raise
        number, name = (getattr(error, field, None) for field in ("errno", "filename"))
        raise OSError(number or errno.ENOSPC, why(error), name or str(path)) from None


def why(error):
    """What the system says of a failed write, or else its writer, on one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:150]


def no_room(error):
    """Whether a write failed for want of room, of quota, or at the limit of a file's size: as the system says it, or numpy's,
    safetensors' or torch's writer in its own words. Not what we say ourselves, which may quote anything."""
    return not isinstance(error, InputError) and (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(words in str(error) for words in (
            "No space left", "quota exceeded", "File too large", " requested and ", "PytorchStreamWriter", "unexpected pos", "iostream error")))


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


def open_tensors(path):
    """The safetensors file at `path`, opened; InputError if it is torn or none."""
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own class for a torn header
        raise InputError(f"{path}: not a readable safetensors file ({error}); download it again") from None


def read_tensors(path):
    """{name: tensor} of the safetensors file at `path`."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def check_out(path):
    """Refuse a file --out that could not be written when the work is done."""
    try:
        tempfile.TemporaryFile(dir=Path(path).parent).close()
    except OSError as error:
        raise InputError(f"--out is {path}; expected a file in an existing folder that can be written to ({error.strerror})") from None
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


def write_packed(folder, pairs, meta):
    """Write the arrays of `pairs`, an iterable of (prompt, chosen, rejected) id sequences; meta.json comes last.

    The old meta.json is removed first, so that a job killed half-way leaves a folder that no one takes for finished.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    chunks, bounds, end = [], [], 0
    for parts in pairs:
        row = [end]
        for ids in parts:
            chunks.append(np.asarray(ids, dtype=np.uint32))
            row.append(row[-1] + len(ids))
        bounds.append(row)
        end = row[-1]
    tokens = np.concatenate(chunks) if chunks else np.zeros(0, np.uint32)
    bounds = np.asarray(bounds, np.int64).reshape(-1, 4)
    write_array(folder / "tokens.npy", tokens)
    write_array(folder / "bounds.npy", bounds)
    data = fingerprint(tokens, bounds, meta["tokenizer"], meta["end_token_id"])
    write_json(folder / "meta.json", sealed({"format": FORMAT, "fingerprint": data, "pairs": len(bounds), **meta}))


class Packed:
    """Memory-mapped reader of a packed/ folder. packed[i] -> (prompt, chosen, rejected), uint32 arrays."""

    def __init__(self, folder):
        self.folder = Path(folder)
        mend = f"python data_prep.py --in prefs.jsonl --out {folder}"
        self.meta = read_json(self.folder / "meta.json", mend)
        if self.meta.get("format") != FORMAT:
            raise InputError(f"{folder}/meta.json: format {self.meta.get('format')}, expected {FORMAT}; run: {mend}")
        unharmed(self.meta, self.folder / "meta.json", mend)
        if self.task == "sft":
            mend = f"python data_prep.py --task sft --in sft.jsonl --out {folder}"
        self.tokens, self.bounds = (open_array(self.folder / f"{name}.npy", mend) for name in ("tokens", "bounds"))
        if self.bounds.shape != (self.meta["pairs"], 4) or len(self.bounds) and self.bounds[-1, 3] != len(self.tokens):
            raise InputError(f"{folder}: tokens.npy, bounds.npy and meta.json disagree; run: {mend}")
        if fingerprint(self.tokens, self.bounds, self.meta["tokenizer"], self.meta["end_token_id"]) != self.meta["fingerprint"]:
            raise InputError(f"{folder}: tokens.npy or bounds.npy is not as it was written; run: {mend}")
        if not len(self.bounds):
            raise InputError(f"{folder}: holds no pair; run: {mend}")
        # (pairs, 3) where in noise-k.npy a pair's chosen starts, its rejected starts, and both end
        lengths = np.diff(self.bounds[:, 1:], axis=1)  # (pairs, 2) response tokens
        self.noise_bounds = np.concatenate(([0], lengths.cumsum()))[2 * np.arange(len(lengths))[:, None] + np.arange(3)]

    @property
    def task(self):
        """"preferences" or "sft"; a folder that does not say holds preferences."""
        return self.meta.get("task", "preferences")

    @property
    def remake(self):
        """The command that packs the same source anew."""
        task = " --task sft" if self.task == "sft" else ""
        return f"python data_prep.py{task} --in {shlex.quote(str(self.meta['source']))} --out {shlex.quote(str(self.folder))}"

    def need_pairs(self):
        """Refuse SFT data where preferences are needed."""
        if self.task == "sft":
            raise InputError(f"{self.folder}: holds SFT data, one response a prompt and no preferences; run: python train_dpo.py "
                             f"--loss_type sft --data {self.folder}, or pack preferences into another folder")

    def lines(self):
        """(pairs,) int64: each pair's line in the source."""
        path = self.folder / "lines.npy"
        lines = open_array(path, self.remake)
        if fingerprint(lines) != self.meta.get("lines"):
            raise InputError(f"{path}: is not as it was written; run: {self.remake}")
        return lines

    def __len__(self):
        return len(self.bounds)

    def __getitem__(self, index):
        start, *ends = self.bounds[index]
        return tuple(self.tokens[a:b] for a, b in zip((start, *ends), ends))

    def content(self, index):
        """All ids of a pair, what its noise is keyed by."""
        return self.tokens[self.bounds[index, 0]:self.bounds[index, 3]]


def open_array(path, mend):
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # what a flipped bit in a header makes numpy raise is of many kinds
        raise InputError(f"{path}: cannot be read as an array ({error}); make it again with: {mend}") from None


def pack_masks(masked):
    """(S, n) bool -> (n, ceil(S/8)) uint8, big-endian over states."""
    return np.packbits(masked.T, axis=1)


def unpack_masks(bits, S):
    """(n, ceil(S/8)) uint8 -> (S, n) bool."""
    return np.unpackbits(bits, axis=1, count=S).T.astype(bool)


class Reference:
    """Memory-mapped reader of packed/ref-<key>/ for one run; `wanted` is the key's fields as the run needs them."""

    def __init__(self, packed, wanted, noise_sets, mend):
        self.folder = packed.folder / f"ref-{fingerprint(wanted)}"
        if not (self.folder / "meta.json").exists():
            raise InputError(missing_reference(packed.folder, wanted, mend))
        self.meta = read_sealed(self.folder / "meta.json", mend)
        self.S = self.meta["states"]
        self.packed, self.mend = packed, mend
        if self.meta["noise_sets"] < noise_sets:
            raise InputError(f"{self.folder}: holds {self.meta['noise_sets']} noise sets, --noise_sets {noise_sets} "
                             f"were asked for; run: {mend}")
        self.noise = [open_array(self.folder / f"noise-{k}.npy", mend) for k in range(noise_sets)]
        self.scores = [open_array(self.folder / f"ref_scores-{k}.npy", mend) for k in range(noise_sets)]
        for bits, scores in zip(self.noise, self.scores):
            if bits.shape != (packed.noise_bounds[-1, 2], -(-self.S // 8)) or scores.shape != (len(packed), 2, self.S):
                raise InputError(f"{self.folder}: its arrays do not have the shapes of {packed.folder}; run: {mend}")
        for name in (f"{kind}-{k}.npy" for kind in ("noise", "ref_scores") for k in range(noise_sets)):
            if file_sha256(self.folder / name) != self.meta["files"].get(name):
                raise InputError(f"{self.folder / name}: is not as it was written; remove {self.folder}, and run: {mend}")

    def masks(self, index, noise_set):
        """masked (S, n) of chosen and of rejected, bool."""
        a, b, c = self.packed.noise_bounds[index]
        bits = self.noise[noise_set]
        return unpack_masks(bits[a:b], self.S), unpack_masks(bits[b:c], self.S)


def missing_reference(folder, wanted, mend):
    """One sentence: there is none, or which field of the nearest existing one differs."""
    nearest = None
    for path in sorted(Path(folder).glob("ref-*/meta.json")):
        have = read_json(path, mend)["depends_on"]
        differs = {name: (have.get(name), value) for name, value in wanted.items() if have.get(name) != value}
        if nearest is None or len(differs) < len(nearest[1]):
            nearest = path.parent, differs
    if nearest is None:
        return f"{folder}: holds no reference scores; run: {mend}"
    said = ", ".join(f"{name} is {have} there and {want} in this run" for name, (have, want) in nearest[1].items())
    return f"{nearest[0]}: made for another run ({said}); run: {mend}"
