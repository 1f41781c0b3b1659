"""What to change in a run that does not fit, in the order in which plan.py tries it; a warning about bf16 masters."""

import json
from pathlib import Path
from typing import NamedTuple

from training import deepspeed_config

ROOT = Path(__file__).parent.parent


class Try(NamedTuple):
    """Something to change in a run that does not fit."""

    values: dict  # of model arguments
    ds: dict
    copy: str = ""  # what to change in a copy of a ds_config

    def words(self, model_args):
        """What to change, in words: the flags whose values model_args does not have yet."""
        changes = {name: value for name, value in self.values.items() if getattr(model_args, name) != value}
        flags = " ".join(f"--{name} {'true' if value is True else value}" for name, value in changes.items())
        return " and ".join(part for part in (self.copy, flags) if part)


def tries(model_args, longest, ds, machine):
    """[Try]: first what changes memory alone, then LoRA, then 4 bits, then master weights in bf16 (see stuck()).

    longest: tokens of the longest row, the fewest of a forward pass.
    """
    frugal = {"tokens_per_forward": longest, "gradient_checkpointing": True}
    roomy = {"tokens_per_forward": "auto", "gradient_checkpointing": True}
    bf16 = {"use_mixed_precision": "bf16"}
    lora = {"lora_r": model_args.lora_r or 16}
    float32_masters, bf16_masters = offload_configs(model_args)

    # 1. The same with as little as possible in a graph
    found = [Try(frugal, ds)]

    # 2. Another ds_config
    for more in ({}, frugal):
        for name, other in float32_masters:
            found.append(Try({"deepspeed": name, **more}, other))

    # 3. Such a ds_config without page-locked memory, where that is rounded up
    if machine.rounded:
        for more in ({}, frugal):
            for name, other in float32_masters:
                found.append(Try(more, unlocked(other), f"a copy of {name} with pin_memory false"))

    # 4. LoRA
    for more in (roomy, bf16 | roomy, frugal, bf16 | frugal):
        for name, other in float32_masters:
            found.append(Try({**lora, "deepspeed": name, **more}, other))

    # 5. LoRA on weights in 4 bits, all on the card
    name = "ds_configs/zero0.json"
    for more in (roomy, bf16 | roomy, frugal, bf16 | frugal):
        values = {**lora, "load_in_4bit": True, "deepspeed": name, **more}
        found.append(Try(values, deepspeed_config.read_ds_config(ROOT / name)))

    # 6. Master weights in bf16
    for name, other in bf16_masters:
        found.append(Try({"deepspeed": name, **frugal}, other))
    return found


def offload_configs(model_args):
    """([(name, ds_config)] with float32 master weights, the same with bf16 ones): those of ds_configs/ that offload."""
    float32_masters, bf16_masters = [], []
    for path in sorted(ROOT.glob("ds_configs/*_offload*.json")):
        ds = deepspeed_config.read_ds_config(path)
        if not (model_args.load_in_4bit and ds["zero_optimization"]["stage"] == 3):
            masters = bf16_masters if stuck(ds, 1) else float32_masters
            masters.append((f"ds_configs/{path.name}", ds))
    return float32_masters, bf16_masters


def unlocked(ds):
    """`ds` without page-locked memory."""
    return json.loads(json.dumps(ds).replace('"pin_memory": true', '"pin_memory": false'))


def stuck(ds, learning_rate):
    """A warning about master weights in bf16, or "".

    AdamW moves a weight by about the learning rate. bf16 has 8 significant bits, so a weight stays where it is if the
    spacing of bf16 numbers there is more than twice that rate.
    """
    if not ds.get("bf16", {}).get("bf16_master_weights_and_grads"):
        return ""
    largest = f"{256 * learning_rate:.2g}"
    return (
        f"master weights in bf16 round a step of {learning_rate:g} away on every weight above {largest}, nearly all of "
        "them at DPO's learning rates; use LoRA, or float32 masters (ds_configs/zero3_offload_4080.json)"
    )
