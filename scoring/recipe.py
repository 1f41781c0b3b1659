"""What a score depends on: the arguments and their checks, the fields of ref-<key>, how noise is drawn and replayed.

n response tokens, S states, T denoising steps.
"""

import shlex

import numpy as np

from files import InputError
from models import families, folders
from preferences.reuse import known_tokenizer
from scoring import noise, sft_noise
from scoring.states import response_states

# Names of the arguments that reference scores depend on: a run must have the same
SAME = (
    "model_name_or_path",
    "shift_logits",
    "block_size",
    "load_in_4bit",
    "use_mixed_precision",
    "estimator",
    "diffusion_steps",
    "trajectories",
    "order",
    "block_length",
    "noise_sets",
    "noise_seed",
    "ld_alpha",
)


def depends_on(packed, model_args, noise_args):
    """What reference scores depend on: only a run where all of this is the same may use them."""
    model_config = folders.plain_config(model_args.model_name_or_path)
    blocks = families.blocks(model_config, model_args.block_size, model_args.shift_logits)
    found = {
        "data": packed.meta["fingerprint"],
        "model": folders.model_fingerprint(model_args.model_name_or_path),
        "tokenizer": packed.meta["tokenizer"],
        "estimator": noise_args.estimator,
        "order": noise_args.order,
        "block_length": block_length(noise_args),
        "diffusion_steps": noise_args.diffusion_steps,
        "trajectories": noise_args.trajectories,
        "noise_seed": noise_args.noise_seed,
        "drawing": noise_args.estimator in noise.ESTIMATORS and noise.drawing(noise_args.estimator, blocks is not None),
        "mask_token_id": packed.meta["mask_token_id"],
        "shift_logits": families.shifted(model_config, model_args.shift_logits),
        "block_size": blocks.size if blocks else 0,
        "dtype": model_args.use_mixed_precision,
        "load_in_4bit": model_args.load_in_4bit,
    }
    if noise_args.ld_alpha != 1:
        found["ld_alpha"] = noise_args.ld_alpha
    return found


def state_count(noise_args):
    """S, the states of a response."""
    return noise.state_count(noise_args.estimator, noise_args.diffusion_steps, noise_args.trajectories)


def block_length(noise_args):
    """None for random order, whose noise does not depend on a block length."""
    return noise_args.block_length if noise_args.order == "blocks" else None


def check(packed, model_args, noise_args):
    """Fill in what is auto, and return the model's Masking.

    Raises InputError for arguments that make no score, and for arrays that another tokenizer made.
    """
    model_args.model_name_or_path = model_args.model_name_or_path or packed.meta["model_name_or_path"]
    model_config = folders.plain_config(model_args.model_name_or_path)
    blocks = families.blocks(model_config, model_args.block_size, model_args.shift_logits)
    noise.settle(noise_args, blocks is not None)
    if packed.task == "kto" and (noise_args.ld_alpha != 1 or noise_args.diffusion_steps == "auto"):
        raise InputError(
            f"{packed.folder}: judged responses have no pairs, which --ld_alpha and --diffusion_steps auto need; leave "
            "out the first, give the second a number"
        )
    if noise_args.order == "blocks" and noise_args.diffusion_steps == "auto":
        raise InputError("--diffusion_steps auto is measured in random order; give --order blocks a number")
    if noise_args.estimator == "stepwise" and noise_args.diffusion_steps == "auto":
        raise InputError("--diffusion_steps auto does not measure --estimator stepwise; give it a number")
    if noise_args.order == "blocks" and noise_args.estimator not in ("stepwise", "auto"):
        raise InputError(
            f"--estimator {noise_args.estimator} works in random order only; --order blocks goes with stepwise"
        )
    tokenizer = known_tokenizer(packed.meta, model_args.model_name_or_path, model_args.trust_remote_code)
    if tokenizer.fingerprint != packed.meta["tokenizer"]:
        raise InputError(
            f"{packed.folder}: packed with another tokenizer than {model_args.model_name_or_path}'s; run: "
            f"{packed.remake} --model_name_or_path {shlex.quote(model_args.model_name_or_path)}"
        )
    mask_id = packed.meta["mask_token_id"]
    if model_args.mask_token_id not in (None, mask_id):
        raise InputError(
            f"{packed.folder}: packed with the mask {mask_id}, not --mask_token_id {model_args.mask_token_id}; "
            "give data_prep.py that flag too"
        )
    return families.Masking(mask_id, blocks)


def partition(prompt_tokens, n, blocks):
    """How a block-causal model divides a response of n tokens: the arguments block and fixed of scoring/noise.py.

    {} for a bidirectional model (blocks None).
    """
    if blocks is None:
        return {}
    places = prompt_tokens + np.arange(n)
    is_first = (places % blocks.size == 0) & (places > 0)
    return {"block": places // blocks.size, "fixed": is_first & blocks.first_from_clean}


def sft_recipe(model_args):
    """How the model's family draws the noise of SFT: sft_noise.Recipe."""
    model_type = folders.plain_config(model_args.model_name_or_path).model_type
    return sft_noise.RECIPES.get(model_type, sft_noise.LLADA)


def draw(packed, index, side, noise_args, noise_set, blocks=None):
    """masked (S, n) bool of one response of a pair; side 0 is chosen, 1 rejected."""
    name = noise.side_of(noise_args.estimator, side, blocks is not None)
    rng = noise.generator(noise_args.noise_seed, packed.content(index), name, noise_set)
    prompt, n = packed[index][0], len(packed[index][1 + side])
    T, R = noise_args.diffusion_steps, noise_args.trajectories
    divided = partition(len(prompt), n, blocks)
    return noise.state_masks(n, noise_args.estimator, T, R, rng, block_length(noise_args), **divided)


def replay(prompt, response, masked, noise_args, masking, shared=None):
    """The States of stored masks (S, n). shared: tokens of the shorter response of a pair.

    Those beyond count ld_alpha (LD-DPO, arXiv 2409.06411, equation 9): what is merely longer is worth less.
    """
    T, R = noise_args.diffusion_steps, noise_args.trajectories
    divided = partition(len(prompt), len(response), masking.blocks)
    weight = noise.state_weights(masked, noise_args.estimator, T, R, **divided)
    if noise_args.ld_alpha != 1 and shared is not None:
        weight = np.where(np.arange(len(response)) < shared, weight, noise_args.ld_alpha * weight).astype(np.float32)
    return response_states(prompt, response, masked, weight, *masking)
