"""Checks of the sampling arguments (config.SampleArguments). Every command that samples calls check() first."""

import math

from files import InputError

EXAMPLES = {"temperature": 0.7, "cfg_scale": 0.5}  # of arguments that are 0 or more


def check(sample):
    """Fill in steps, block_length and device in place. Raises InputError for values that have no meaning together."""
    check_values(sample)
    from training import cards  # here alone: check_values() answers before a command imports torch

    devices = ["cpu"]
    if sample.device != "cpu" and (count := cards.usable()):
        devices += ["cuda", *(f"cuda:{number}" for number in range(count))]
    if sample.device == "auto":
        sample.device = "cuda" if "cuda" in devices else "cpu"
    if sample.device not in devices:
        raise InputError(f"--device is {sample.device!r}; this machine has {', '.join(devices)}")


def check_values(sample):
    """check() of everything but the device."""
    if sample.block_length is None:
        sample.block_length = sample.gen_length
    if sample.threshold is not None:
        check_threshold(sample)
    elif sample.steps is None:
        sample.steps = sample.gen_length
    for name in ("gen_length", "block_length", "batch_size", "steps"):
        value = getattr(sample, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}; expected at least 1")
    check_lengths(sample)
    for name, example in EXAMPLES.items():
        value = getattr(sample, name)
        if not 0 <= value < math.inf:
            raise InputError(f"--{name} is {value}; expected 0 or more, for example --{name} {example}")
    if sample.confidence_eos_eot_inf and sample.remasking == "random":
        raise InputError(
            "--confidence_eos_eot_inf has no meaning with --remasking random, which ignores confidence; leave one out"
        )


def check_threshold(sample):
    threshold = sample.threshold
    if not 0 < threshold <= 1:
        raise InputError(f"--threshold is {threshold}; expected more than 0 and at most 1, for example --threshold 0.9")
    if sample.steps is not None:
        raise InputError(
            f"--steps {sample.steps} contradicts --threshold {threshold}, where confidence decides the number of "
            "passes; leave one out"
        )
    if sample.remasking == "random":
        raise InputError(
            f"--threshold {threshold} has no meaning with --remasking random, which ignores confidence; leave one out"
        )


def check_lengths(sample):
    """A response is whole blocks, and each block takes as many passes as the others."""
    gen_length, block_length, steps = sample.gen_length, sample.block_length, sample.steps
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
