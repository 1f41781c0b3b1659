"""Stored noise and reference scores, packed/ref-<key>/: their key, how score.py writes them and a run reads them.

S states, K noise sets, P pairs. The format is described in preferences/packed.py.
"""

import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import files
from files import InputError
from models import families
from preferences.packed import Packed
from scoring import calibration, recipe

SCORED = ("preferences", "kto")  # tasks whose data have reference scores


class Prepared(NamedTuple):
    """The pairs, the model's masking, what stored scores of this run must depend on, and the folder of those scores."""

    packed: Packed
    masking: families.Masking
    wanted: dict[str, Any]
    folder: Path


def prepare(data_args, model_args, noise_args, tasks=SCORED):
    """Read the packed arrays, fill in the arguments that are auto, and refuse what makes no score. Imports no torch.

    tasks: the packed data that a command can use.
    """
    packed = Packed(data_args.data)
    packed.need(*tasks)
    masking = recipe.check(packed, model_args, noise_args)
    if noise_args.diffusion_steps == "auto" and "sft" not in tasks:
        calibration.settle(packed, model_args, noise_args)
    wanted = recipe.depends_on(packed, model_args, noise_args)
    return Prepared(packed, masking, wanted, packed.folder / f"ref-{files.fingerprint(wanted)}")


def sets_of(folder):
    """The number of noise sets that are complete in a folder of reference scores."""
    path = folder / "meta.json"
    return files.read_sealed(path, "this command, that folder removed")["noise_sets"] if path.exists() else 0


def pack_masks(masked):
    """(S, n) bool -> (n, ceil(S/8)) uint8, big-endian over states."""
    return np.packbits(masked.T, axis=1)


def unpack_masks(bits, S):
    """(n, ceil(S/8)) uint8 -> (S, n) bool."""
    return np.unpackbits(bits, axis=1, count=S).T.astype(bool)


# --- writing ----------------------------------------------------------------------------------------------


def chunk_paths(folder, noise_set, count, size):
    """{range of pairs: path of their chunk} for `count` pairs, `size` in a chunk. Makes the chunks' folder."""
    work = folder / f"chunks-{noise_set}"
    work.mkdir(parents=True, exist_ok=True)
    chunks = [range(first, min(first + size, count)) for first in range(0, count, size)]
    return {pairs: work / f"{pairs.start:09d}-{pairs.stop:09d}.npz" for pairs in chunks}


def write_chunk(path, packed, pairs, masks, scores):
    """Write masks and scores of `pairs`, which come first in `masks` (tokens, ceil(S/8)) and `scores` (P, 2, S)."""
    bounds = packed.noise_bounds[pairs]
    tokens = (bounds[:, 2] - bounds[:, 0]).sum()
    with files.replacing(path, "wb") as file:
        np.savez(file, noise=masks[:tokens], scores=scores[: len(pairs)])


def is_readable(path):
    """Whether a chunk is complete: to read it is to compare its checksums."""
    try:
        with np.load(path, allow_pickle=False) as chunk:
            return chunk["noise"].dtype == np.uint8 and chunk["scores"].dtype == np.float32
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):  # EOFError: an empty file
        return False


def assemble(folder, noise_set, paths):
    """Write the two arrays of a noise set from all its chunks, in order, and remove the chunks."""
    chunks = [np.load(path, allow_pickle=False) for path in paths]
    files.write_array(folder / f"noise-{noise_set}.npy", np.concatenate([chunk["noise"] for chunk in chunks]))
    files.write_array(folder / f"ref_scores-{noise_set}.npy", np.concatenate([chunk["scores"] for chunk in chunks]))
    shutil.rmtree(folder / f"chunks-{noise_set}")


def write_meta(folder, wanted, noise_sets, recorded):
    """Write meta.json: from now on so many noise sets are complete. wanted: what the scores depend on."""
    digests = {name: files.file_sha256(folder / name) for name in array_names(noise_sets)}
    files.write_json(
        folder / "meta.json",
        files.sealed({"depends_on": wanted, "noise_sets": noise_sets, "files": digests, **recorded}),
    )


def array_names(noise_sets):
    """The files of so many noise sets."""
    return [f"{kind}-{k}.npy" for kind in ("noise", "ref_scores") for k in range(noise_sets)]


# --- reading ----------------------------------------------------------------------------------------------


class Reference:
    """Memory-mapped reader of packed/ref-<key>/ for one run.

    wanted: what the run's scores depend on, recipe.depends_on(). mend: the command that makes them. Raises InputError
    if they are missing, made for another run, or damaged.
    """

    def __init__(self, packed, wanted, noise_sets, mend):
        self.folder = packed.folder / f"ref-{files.fingerprint(wanted)}"
        if not (self.folder / "meta.json").exists():
            raise InputError(missing_reference(packed.folder, wanted, mend))
        self.meta = files.read_sealed(self.folder / "meta.json", mend)
        self.S = self.meta["states"]
        self.packed, self.mend = packed, mend
        if self.meta["noise_sets"] < noise_sets:
            raise InputError(
                f"{self.folder}: holds {self.meta['noise_sets']} noise sets, --noise_sets {noise_sets} were asked for; "
                f"run: {mend}"
            )
        self.noise = [files.open_array(self.folder / f"noise-{k}.npy", mend) for k in range(noise_sets)]
        self.scores = [files.open_array(self.folder / f"ref_scores-{k}.npy", mend) for k in range(noise_sets)]
        for bits, scores in zip(self.noise, self.scores):
            if bits.shape != (packed.noise_bounds[-1, 2], -(-self.S // 8)) or scores.shape != (len(packed), 2, self.S):
                raise InputError(f"{self.folder}: its arrays do not have the shapes of {packed.folder}; run: {mend}")
        for name in array_names(noise_sets):
            if files.file_sha256(self.folder / name) != self.meta["files"].get(name):
                raise InputError(
                    f"{self.folder / name}: is not as it was written; remove {self.folder}, and run: {mend}"
                )

    def masks(self, index, side, noise_set):
        """masked (S, n) of a response, bool; side 0 is chosen, 1 rejected."""
        start, end = self.packed.noise_bounds[index, side : side + 2]
        return unpack_masks(self.noise[noise_set][start:end], self.S)


def missing_reference(folder, wanted, mend):
    """One sentence: there are no scores, or in which fields those that are most alike differ."""
    found = {}  # {folder: its differences}
    for path in sorted(Path(folder).glob("ref-*/meta.json")):
        have = files.read_json(path, mend)["depends_on"]
        found[path.parent] = [
            f"{name} is {have.get(name)} there and {wanted.get(name)} in this run"
            for name in {**wanted, **have}
            if have.get(name) != wanted.get(name)
        ]
    if not found:
        return f"{folder}: holds no reference scores; run: {mend}"
    nearest = min(found, key=lambda path: len(found[path]))
    return f"{nearest}: made for another run ({', '.join(found[nearest])}); run: {mend}"
