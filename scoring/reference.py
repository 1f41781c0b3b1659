"""Stored noise and reference scores of one run, memory-mapped: packed/ref-<key>/."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files import InputError, file_sha256, fingerprint, open_array, read_json, read_sealed
from preferences.packed import Packed
from scoring import calibration, recipe


class Prepared(NamedTuple):
    """The pairs, the mask's id, what stored scores of this run must depend on, and the folder of those scores."""

    packed: Packed
    mask_id: int
    wanted: dict[str, Any]
    folder: Path


def prepare(data_args, model_args, noise_args, sft=False):
    """Read the packed arrays, fill in the arguments that are auto, and refuse what makes no score. Imports no torch.

    sft: no preferences are needed, and no calibration.
    """
    packed = Packed(data_args.data)
    if not sft:
        packed.need_pairs()
    mask_id = recipe.check(packed, model_args, noise_args)
    if noise_args.diffusion_steps == "auto" and not sft:
        calibration.settle(packed, model_args, noise_args)
    wanted = recipe.depends_on(packed, model_args, noise_args)
    return Prepared(packed, mask_id, wanted, packed.folder / f"ref-{fingerprint(wanted)}")


def sets_of(folder):
    """Noise sets that are scored completely."""
    path = folder / "meta.json"
    return read_sealed(path, "this command, that folder removed")["noise_sets"] if path.exists() else 0


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
            raise InputError(
                f"{self.folder}: holds {self.meta['noise_sets']} noise sets, --noise_sets {noise_sets} "
                f"were asked for; run: {mend}"
            )
        self.noise = [open_array(self.folder / f"noise-{k}.npy", mend) for k in range(noise_sets)]
        self.scores = [open_array(self.folder / f"ref_scores-{k}.npy", mend) for k in range(noise_sets)]
        for bits, scores in zip(self.noise, self.scores):
            if bits.shape != (packed.noise_bounds[-1, 2], -(-self.S // 8)) or scores.shape != (len(packed), 2, self.S):
                raise InputError(f"{self.folder}: its arrays do not have the shapes of {packed.folder}; run: {mend}")
        for name in (f"{kind}-{k}.npy" for kind in ("noise", "ref_scores") for k in range(noise_sets)):
            if file_sha256(self.folder / name) != self.meta["files"].get(name):
                raise InputError(
                    f"{self.folder / name}: is not as it was written; remove {self.folder}, and run: {mend}"
                )

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
