"""A calibration on disk, and the design it recommends; calibrate.py measures it."""

import config
import files
from files import InputError
from models import folders
from scoring import recipe

STEP_PAIRS = 16


def key(packed, model_args):
    """What a calibration depends on."""
    return {
        "data": packed.meta["fingerprint"],
        "model": folders.model_fingerprint(model_args.model_name_or_path),
        "tokenizer": packed.meta["tokenizer"],
        "dtype": model_args.use_mixed_precision,
        "load_in_4bit": model_args.load_in_4bit,
        "shift_logits": model_args.shift_logits,
    }


def place(packed, model_args):
    return packed.folder / f"calibration-{files.fingerprint(key(packed, model_args))}.json"


def settle(packed, model_args, noise_args):
    """Fill in --diffusion_steps auto, and with it trajectories and estimator, from the calibration."""
    path = place(packed, model_args)
    mend = f"python calibrate.py --data {packed.folder} {config.flags(recipe.SAME, model_args)}"
    if not path.exists():
        raise InputError(f"--diffusion_steps auto: {packed.folder} holds no calibration of this model; run: {mend}")
    rows = files.read_json(path, mend)["rows"]
    best = recommend([row for row in rows if noise_args.estimator in ("auto", row["estimator"])])
    noise_args.estimator, noise_args.diffusion_steps, noise_args.trajectories = (
        best["estimator"],
        best["diffusion_steps"],
        best["trajectories"],
    )


def recommend(rows):
    """The row of least noise at equal cost, of those with little bias of the margin; of least bias where there is none."""
    fair = [
        row for row in rows if row["margin_bias"] ** 2 <= (row["between_pairs"] + row["margin_variance"]) / STEP_PAIRS
    ]
    return min(fair, key=lambda row: row["noise_x_cost"]) if fair else min(rows, key=lambda row: row["margin_bias"])
