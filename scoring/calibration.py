"""A calibration: what it measures, where it is on disk, which design it recommends. See calibrate.py."""

import math
import shlex
from typing import NamedTuple

import numpy as np

import config
import files
from files import InputError
from models import families, folders
from scoring import noise, recipe, signal


class Design(NamedTuple):
    """An estimator with its T and R."""

    estimator: str
    diffusion_steps: int
    trajectories: int


DESIGNS = [Design("spread", T, R) for T, R in ((2, 2), (2, 3), (2, 7), (3, 3))]
DESIGNS += [Design("radau", T, R) for T, R in ((2, 3), (3, 3))]
DESIGNS += [Design("elbo", 8, 1)]
DESIGNS += [Design("elbo_stratified", N, 1) for N in (4, 8)]
BLOCK_DESIGNS = [Design("elbo_stratified", N, 1) for N in (2, 3, 4, 6, 8)]  # of block-causal models
BLOCK_DESIGNS += [Design("elbo", 8, 1)]


def designs_of(blocks):
    """The designs to measure, for a model with these families.Blocks, or None."""
    return BLOCK_DESIGNS if blocks else DESIGNS


def key(packed, model_args):
    """What a calibration depends on."""
    model_config = folders.plain_config(model_args.model_name_or_path)
    blocks = families.blocks(model_config, model_args.block_size, model_args.shift_logits)
    designs = [[*design, noise.drawing(design.estimator, blocks is not None)] for design in designs_of(blocks)]
    return {
        "data": packed.meta["fingerprint"],
        "model": folders.model_fingerprint(model_args.model_name_or_path),
        "tokenizer": packed.meta["tokenizer"],
        "dtype": model_args.use_mixed_precision,
        "load_in_4bit": model_args.load_in_4bit,
        "shift_logits": model_args.shift_logits,
        "block_size": model_args.block_size,
        "designs": files.fingerprint(designs),
    }


def place(packed, model_args):
    """The path of the calibration of these pairs and this model."""
    return packed.folder / f"calibration-{files.fingerprint(key(packed, model_args))}.json"


def settle(packed, model_args, noise_args):
    """Fill in --diffusion_steps auto, and with it trajectories and estimator, from the calibration."""
    path = place(packed, model_args)
    mend = f"python calibrate.py --data {shlex.quote(str(packed.folder))} {config.flags(recipe.SAME, model_args)}"
    if not path.exists():
        raise InputError(f"--diffusion_steps auto: {packed.folder} holds no calibration of this model; run: {mend}")
    rows = files.read_json(path, mend)["rows"]
    best = cheapest([row for row in rows if noise_args.estimator in ("auto", row["estimator"])])
    for name in Design._fields:
        setattr(noise_args, name, best[name])


def fair(rows):
    """The rows whose mean gradient is more right than wrong; if there are none, the one with the least bias.

    A design that counts some levels too much can have more signal, and may teach less of what other levels decide.
    """
    return [row for row in rows if row["bias"] <= 1] or [min(rows, key=bias_of)]


def cheapest(rows):
    """Where pairs are the limit: of the fair rows within a standard error of the best signal, that of least passes.

    The standard error is that of the difference: designs are measured on the same pairs.
    """
    rows = fair(rows)
    best = max(rows, key=signal_of)
    near = []
    for row in rows:
        error = signal.spread(np.subtract(best["without"], row["without"]))
        if best["signal"] - row["signal"] <= error:
            near.append(row)
    return min(near, key=passes_and_signal)


def densest(rows):
    """Where compute is the limit: the fair row with the most signal for each pass."""
    return max(fair(rows), key=signal_per_pass)


def bias_of(row):
    return row["bias"]


def signal_of(row):
    return row["signal"]


def passes_and_signal(row):
    return row["passes"], -row["signal"]


def signal_per_pass(row):
    return row["signal"] / row["passes"]


def is_finite(rows):
    """Whether every number of the table is."""
    return all(math.isfinite(row[name]) for row in rows for name in ("signal", "noise", "bias"))
