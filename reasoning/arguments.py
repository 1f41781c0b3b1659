"""Checks of the sampling arguments (config.SampleArguments). Every command that samples calls check() first."""

import math

from files import InputError
from models import families, folders

EXAMPLES = {"temperature": 0.7, "cfg_scale": 0.5}  # of arguments that are 0 or more


def check(sample):
    """Fill in steps, block_length and device in place. Raises InputError for values that have no meaning together."""
    check_values(sample)
    blocks = None
    if sample.model_name_or_path:
        config = folders.plain_config(sample.model_name_or_path)
        blocks = families.blocks(config, sample.block_size, sample.shift_logits)
    if blocks:
        check_blocks(sample, blocks)
    else:
        check_lengths(sample)
        if sample.model_name_or_path and config.model_type not in families.KNOWN:
            refuse_cache(sample, config.model_type)
    if sample.block_length is None:
        sample.block_length = blocks.size if blocks else sample.gen_length
    if sample.steps is None and sample.threshold is None:
        sample.steps = sample.gen_length
    from training import cards  # here alone: check_values() answers before a command imports torch

    devices = ["cpu"]
    if sample.device != "cpu" and (count := cards.usable()):
        devices += ["cuda", *(f"cuda:{number}" for number in range(count))]
    if sample.device == "auto":
        sample.device = "cuda" if "cuda" in devices else "cpu"
    if sample.device not in devices:
        raise InputError(f"--device is {sample.device!r}; this machine has {', '.join(devices)}")


def check_values(sample):
    """check() of what neither the model nor the device decides."""
    for name in ("gen_length", "block_length", "batch_size", "steps", "refresh"):
        value = getattr(sample, name)
        if value not in (None, "auto") and value < 1:
            raise InputError(f"--{name} is {value}; expected at least 1")
    for name, example in EXAMPLES.items():
        value = getattr(sample, name)
        if not 0 <= value < math.inf:
            raise InputError(f"--{name} is {value}; expected 0 or more, for example --{name} {example}")
    if sample.threshold is not None and not 0 < sample.threshold <= 1:
        raise InputError(
            f"--threshold is {sample.threshold}; expected more than 0 and at most 1, for example --threshold 0.9"
        )
    if sample.refresh and sample.cache == "none":
        raise InputError(f"--refresh {sample.refresh} has no meaning without --cache prefix or --cache dual; add one")
    if sample.remasking != "low_confidence":
        check_order(sample)


def check_order(sample):
    """Refuse what needs confidences where they decide nothing."""
    for name, value in (("threshold", sample.threshold), ("confidence_eos_eot_inf", sample.confidence_eos_eot_inf)):
        if value:
            given = f"--{name}" if value is True else f"--{name} {value}"
            raise InputError(
                f"{given} has no meaning with --remasking {sample.remasking}, which ignores confidence; leave one out"
            )


def check_blocks(sample, blocks):
    """A block-causal model fixes the blocks; a smaller block_length fills the parts of each from left to right."""
    block_length = sample.block_length
    if block_length is not None and blocks.size % block_length:
        raise InputError(
            f"--block_length {block_length} contradicts {sample.model_name_or_path}, whose blocks have {blocks.size} "
            f"tokens; leave it out, or give a part of them: --block_length {math.gcd(block_length, blocks.size)}"
        )
    if sample.cfg_scale:
        raise InputError(
            f"--cfg_scale {sample.cfg_scale}: guidance needs a bidirectional model, and {sample.model_name_or_path} is "
            "block-causal; leave it out"
        )
    if sample.cache != "none":
        raise InputError(
            f"--cache {sample.cache}: {sample.model_name_or_path} is block-causal and always keeps what is finished, "
            "without approximation; leave it out"
        )


def refuse_cache(sample, kind):
    """Refuse a cache of a model of this model_type, all of whose rows must have one length."""
    if sample.cache != "none":
        raise InputError(
            f"--cache {sample.cache}: {sample.model_name_or_path} (model_type {kind}) cannot read a part of a row; "
            "leave it out"
        )


def check_lengths(sample):
    """A response is whole blocks, and each block takes as many passes as the others."""
    gen_length, steps = sample.gen_length, sample.steps
    block_length = sample.block_length or gen_length
    if gen_length % block_length:
        raise InputError(
            f"--gen_length {gen_length} is not a multiple of --block_length {block_length}; "
            f"try --block_length {math.gcd(gen_length, block_length)}"
        )
    blocks = gen_length // block_length
    if steps is not None and steps % blocks:
        raise InputError(
            f"--steps {steps} is not a multiple of the {blocks} blocks that --gen_length {gen_length} and "
            f"--block_length {block_length} make; try --steps {-(-steps // blocks) * blocks}"
        )
