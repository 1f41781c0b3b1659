"""A calibration: how it is measured from scores, where it is on disk, which design it recommends. See calibrate.py.

D draws of a design.
"""

import shlex

import config
import files
from files import InputError
from models import folders
from scoring import recipe

STEP_PAIRS = 16  # pairs of an optimizer step, whose own noise a bias is compared with


def key(packed, model_args):
    """What a calibration depends on."""
    return {
        "data": packed.meta["fingerprint"],
        "model": folders.model_fingerprint(model_args.model_name_or_path),
        "tokenizer": packed.meta["tokenizer"],
        "dtype": model_args.use_mixed_precision,
        "load_in_4bit": model_args.load_in_4bit,
        "shift_logits": model_args.shift_logits,
        "block_size": model_args.block_size,
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
    best = recommend([row for row in rows if noise_args.estimator in ("auto", row["estimator"])])
    for name in ("estimator", "diffusion_steps", "trajectories"):
        setattr(noise_args, name, best[name])


def recommend(rows):
    """The row with the least noise at equal cost among those with a small bias; if there is none, with the least bias.

    Small: below the standard error of the mean margin of a step of STEP_PAIRS pairs, which that step has in any case.
    """
    fair = []
    for row in rows:
        variance_of_step = (row["between_pairs"] + row["margin_variance"]) / STEP_PAIRS
        if row["margin_bias"] ** 2 <= variance_of_step:
            fair.append(row)
    if fair:
        return min(fair, key=lambda row: row["noise_x_cost"])
    return min(rows, key=lambda row: row["margin_bias"])


def margins(policy, reference):
    """(pairs, D) of two (pairs, D, 2)."""
    gain = policy - reference
    return gain[..., 0] - gain[..., 1]


def variance(values):
    """The mean over pairs of the variance over draws."""
    return values.var(1, ddof=1).mean()


def measure(policy, reference, truth_policy, truth_reference):
    """Variance and bias of score and margin over draws: each argument (pairs, D, 2)."""
    margin, truth = margins(policy, reference), margins(truth_policy, truth_reference)
    bias = margin.mean(1) - truth.mean(1)  # (pairs,)
    bias_by_chance = variance(margin) / margin.shape[1] + variance(truth) / truth.shape[1]  # squared
    between_pairs = truth.mean(1).var(ddof=1) - variance(truth) / truth.shape[1]
    return {
        "score_variance": variance(policy),
        "score_bias": (policy.mean(1) - truth_policy.mean(1)).mean(),
        "margin_variance": variance(margin),
        "margin_bias": max(0.0, (bias**2).mean() - bias_by_chance) ** 0.5,
        "between_pairs": max(0.0, between_pairs),
    }
