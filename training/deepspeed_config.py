"""Read a ds_config, refuse what contradicts the run, and fill in what it leaves as "auto".

ds_configs/*.json -> read_ds_config() -> training_config() or scoring_config() -> deepspeed.initialize

The keys are in deepspeed_keys.py.
"""

import json
import math
from pathlib import Path
from typing import Annotated, get_args

import pydantic
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum

from cli.parser import nearest
from files import InputError, each_once
from training import nvme
from training.deepspeed_keys import (
    FROM_THE_RUN,
    LIMITED,
    NEVER_AUTO,
    OURS,
    SCHEDULERS,
    SECTIONS,
    WITH_A_SWITCH,
    WITHOUT_A_SWITCH,
)

NO_TIMER = {"throughput": {"enabled": False}}  # by default DeepSpeed's waits for the device in each forward pass


# --- reading ----------------------------------------------------------------------------------------------


def read_ds_config(path):
    """The ds_config at `path`, checked; without a path, stage 0 and torch's AdamW.

    It holds "auto" for what the run decides (FROM_THE_RUN), and only there. Sections that are off are left out, and the
    keys of stage 3 have one name each. Raises InputError for a file that cannot be read, and for what DeepSpeed would
    ignore or refuse later.
    """
    if not path:
        return {"optimizer": {"params": {"torch_adam": True}}, "zero_optimization": {"stage": 0}}
    try:
        with open(path, encoding="utf-8-sig") as file:
            config = json.load(file, object_pairs_hook=each_once, parse_constant=not_a_number)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); see ds_configs/README.md") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object; see ds_configs/README.md")
    check_names(config, SECTIONS, path)
    config = filled_in(with_one_name(without_what_is_off(config, path)))
    check_limits(config, path)
    check_stage(config, path)
    check_precision(config, path)
    check_optimizer(config, path)
    check_nvme(config, path)
    return config


def read_for_sampling(path):
    """read_ds_config() for a command that samples: a file must stream weights."""
    config = read_ds_config(path)
    if path and config["zero_optimization"]["stage"] != 3:
        raise InputError(
            f"--deepspeed {path}: sampling streams weights with ZeRO stage 3 only; leave it out, or name "
            "ds_configs/zero3_offload_4080.json"
        )
    return config


def not_a_number(name):
    """json.load calls this for NaN and Infinity."""
    raise ValueError(f"{name} is not a number")


def without_what_is_off(config, path):
    """The ds_config without the sections that say that something is off. InputError for one that is on."""
    for name, way in (WITH_A_SWITCH | WITHOUT_A_SWITCH).items():
        section = config.get(name, {})
        values = [section.get("enabled")] if name in WITH_A_SWITCH else section.values()
        if any(value not in (False, None, "auto", {}) for value in values):
            raise InputError(f"{path}: {name} is not supported; {way}")
    return {name: value for name, value in config.items() if name not in WITH_A_SWITCH | WITHOUT_A_SWITCH}


def filled_in(section, where=""):
    """A copy of a section in which "auto" is left only where the run decides.

    Elsewhere it becomes our value, or is left out: then DeepSpeed takes its default.
    """
    filled = {}
    for name, value in section.items():
        dotted = f"{where}{name}"
        if isinstance(value, dict):
            filled[name] = filled_in(value, f"{dotted}.")
        elif value != "auto" or dotted in FROM_THE_RUN:
            filled[name] = value
        elif dotted in OURS:
            filled[name] = OURS[dotted]
    return filled


def with_one_name(config):
    """`config` with DeepSpeed's names of today: of a key of stage 3, the one with "stage3_"."""
    aio, zero = config.get("aio", {}), config.get("zero_optimization", {})
    if "thread_count" in aio:  # its name in transformers' documentation, which DeepSpeed 0.19.8 ignores
        aio.setdefault("intra_op_parallelism", aio.pop("thread_count"))
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        if field.alias and name in zero and field.alias not in zero:
            zero[field.alias] = zero.pop(name)
    return config


def check_limits(config, path):
    """Refuse values that would be ignored or would change the gradient."""
    for dotted, (accepted, way) in LIMITED.items():
        section, (*parents, key) = config, dotted.split(".")
        for parent in parents:
            section = section.get(parent) or {}
        if key in section and section[key] not in accepted:
            raise InputError(f"{path}: {dotted} {json.dumps(section[key])} is not supported; {way}")


def check_precision(config, path):
    """Refuse bf16 settings that contradict each other or the stage."""
    bf16, stage = config.get("bf16", {}), config.get("zero_optimization", {}).get("stage")
    masters = bf16.get("bf16_master_weights_and_grads")
    if masters and stage == 0:
        raise InputError(f"{path}: bf16.bf16_master_weights_and_grads needs a ZeRO stage of 1 at least")
    if bf16.get("bf16_optimizer_states") and not masters:
        raise InputError(f"{path}: bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads")
    summed, offloads = config.get("data_types", {}).get("grad_accum_dtype"), nvme.offload_of(config) != "none"
    if summed and (stage == 0 or stage in (1, 2) and offloads):  # see sums_in_float32()
        raise InputError(f"{path}: data_types.grad_accum_dtype needs stage 3, or stage 1 or 2 without an offload")


def check_stage(config, path):
    """Refuse a missing stage, an offload that the stage does not have, and what DeepSpeed refuses itself."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage")
    if stage not in (0, 1, 2, 3):  # missing
        raise InputError(f"{path}: zero_optimization.stage is {stage}, expected 0, 1, 2 or 3; see ds_configs/README.md")
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(name) or {}).get("device", "none")
        if device != "none" and stage < least:
            raise InputError(f"{path}: zero_optimization.{name} needs stage {least} at least, and stage is {stage}")
    try:
        DeepSpeedZeroConfig(**zero)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise InputError(f"{path}: {where}: {first['msg']}; see ds_configs/README.md") from None


def check_optimizer(config, path):
    """Refuse an optimizer that is not AdamW."""
    kind = config.get("optimizer", {}).get("type", "AdamW")
    if kind.lower() == "adafactor":
        raise InputError(
            f"{path}: optimizer.type Adafactor is refused: ZeRO gives an optimizer flat vectors, without the rows and "
            'columns that Adafactor factors, so it would save nothing; write "AdamW" (ds_configs/README.md: bytes per '
            "parameter)"
        )
    if kind.lower() not in ("adam", "adamw"):  # DeepSpeed's Adam decays weights as AdamW does
        raise InputError(f'{path}: optimizer.type {json.dumps(kind)} is not supported; write "AdamW"')


def check_nvme(config, path):
    """Refuse states on an SSD where DeepSpeed would ignore it, or keep them in another precision."""
    zero = config["zero_optimization"]
    optimizer, parameters = (zero.get(name) or {} for name in ("offload_optimizer", "offload_param"))
    if parameters.get("device") == "nvme":
        raise InputError(f'{path}: zero_optimization.offload_param.device "nvme" is not supported; write "cpu"')
    if not nvme.is_used(config):
        return
    why = None
    if zero["stage"] != 3:
        why = f"needs stage 3, and stage is {zero['stage']}"
    elif config.get("bf16", {}).get("bf16_master_weights_and_grads"):
        why = "needs float32 master weights; leave out bf16.bf16_master_weights_and_grads"
    elif optimizer.get("pipeline_read") or optimizer.get("pipeline_write"):
        why = "with pipeline_read or pipeline_write hangs (DeepSpeed 0.19.8); leave them out"
    elif optimizer.get("buffer_count", 4) < 4:
        why = f"needs a buffer_count of 4 at least, and it is {optimizer['buffer_count']}"
    if why:
        raise InputError(f'{path}: zero_optimization.offload_optimizer.device "nvme" {why}')


# --- names and types --------------------------------------------------------------------------------------


def check_names(section, known, path, where=""):
    """Refuse a name that is not known and a value of another type. "auto" is left to resolve().

    known: the names of the section, as in SECTIONS. where: the place of the section, such as "zero_optimization.".
    """
    known = names_of(known)
    for name, value in section.items():
        dotted = f"{where}{name}"
        if name not in known:
            mend = nearest(name, known, "see ds_configs/README.md", 0.6)
            raise InputError(f"{path}: unknown key {json.dumps(dotted)}{mend}")
        field = known[name]
        extra = getattr(field, "json_schema_extra", None) or {}
        if extra.get("deprecated"):
            raise InputError(
                f"{path}: {dotted} is deprecated, write {extra.get('new_param')}; see ds_configs/README.md"
            )
        kind = getattr(field, "annotation", field)
        subsection = section_in(kind)
        if subsection is not None and isinstance(value, dict):
            check_names(value, subsection, path, f"{dotted}.")
        elif value == "auto" and dotted in NEVER_AUTO:
            raise InputError(f'{path}: {dotted} is "auto", which the run does not decide; write {NEVER_AUTO[dotted]}')
        elif value != "auto" or subsection is not None:
            problem = complaint(value, kind, getattr(field, "metadata", ()))
            if problem:
                raise InputError(f"{path}: {dotted} is {json.dumps(value)}, {problem}; see ds_configs/README.md")


def names_of(known):
    """{name: type or field} of a section. A field of one of DeepSpeed's models has its own name and its alias."""
    if isinstance(known, dict):
        return known
    fields = known.model_fields
    aliases = {field.alias: field for field in fields.values() if field.alias}
    return {**fields, **aliases}


def section_in(kind):
    """The section that a type is, or that Optional[...] holds; None if it is not a section."""
    for each in (kind, *get_args(kind)):
        if isinstance(each, dict) or DeepSpeedConfigModel in getattr(each, "__mro__", ()):
            return each
    return None


def complaint(value, kind, limits):
    """What is wrong with a JSON value, or None. 1e8 counts as an integer, as in DeepSpeed; "3" does not."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "expected a finite number"
        value = int(value) if value.is_integer() else value
    if kind is ZeroStageEnum:  # true would count as stage 1
        return None if type(value) is int and 0 <= value <= 3 else "expected 0, 1, 2 or 3"
    if kind is dict:
        return None if isinstance(value, dict) else "expected an object"
    if isinstance(kind, dict) or {dict, DeepSpeedConfigModel} & {*getattr(kind, "__mro__", ())}:
        return "expected an object"
    annotated = Annotated[(kind, *limits)] if limits else kind
    try:
        pydantic.TypeAdapter(annotated).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        return error.errors()[0]["msg"].replace("Input should be", "expected")


# --- filling in -------------------------------------------------------------------------------------------


def resolve(config, values, path):
    """A copy of `config` with the run's values in place of "auto" and of what is missing.

    values: {"a.b.c": (value, flag)}. Raises InputError for a literal that is not the run's value.
    """
    config = json.loads(json.dumps(config))
    for dotted, (value, flag) in values.items():
        *parents, key = dotted.split(".")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        if section.setdefault(key, "auto") not in ("auto", value):
            raise InputError(
                f'{path}: "{dotted}" is {json.dumps(section[key])}, but the run says {flag} = '
                f'{json.dumps(value)}; write "auto" there, or give the run that value'
            )
        section[key] = value
    return config


def training_config(config, args, model_args, path, ranks=1, steps=0):
    """The configuration of the policy's engine. steps: of the run."""
    batch_size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    product = "per_device_train_batch_size x gradient_accumulation_steps x ranks"
    values = {
        "train_batch_size": (batch_size * accumulation * ranks, product),
        "train_micro_batch_size_per_gpu": (batch_size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "gradient_accumulation_steps"),
        "gradient_clipping": (args.max_grad_norm, "max_grad_norm"),
        "bf16.enabled": (model_args.use_mixed_precision == "bf16", "use_mixed_precision == bf16"),
        "optimizer.params.lr": (args.learning_rate, "learning_rate"),
        "optimizer.params.betas": ([args.adam_beta1, args.adam_beta2], "adam_beta1, adam_beta2"),
        "optimizer.params.weight_decay": (args.weight_decay, "weight_decay"),
    }
    if nvme.is_used(config):
        folder = str(Path(args.output_dir, "nvme"))
        values["zero_optimization.offload_optimizer.nvme_path"] = (folder, "output_dir/nvme")
    if "scheduler" in config:
        values |= schedule(config["scheduler"], args, steps, path)
    config = resolve(config, values, path)
    # To DeepSpeed each backward pass is an accumulation step. Their number varies, so it is not told: we scale the loss
    # and set the boundary ourselves. The learning rate is set before each step.
    config = {name: value for name, value in config.items() if name not in ("train_batch_size", "scheduler")}
    config["gradient_accumulation_steps"] = 1
    config["optimizer"]["type"] = "AdamW"
    for name in ("adam_w_mode", "bias_correction"):  # true, which torch's AdamW does not know as arguments
        config["optimizer"]["params"].pop(name, None)
    if nvme.offload_of(config) == "none":
        config["optimizer"]["params"].setdefault("torch_adam", True)  # DeepSpeed's own needs the CUDA toolkit
    if model_args.lora_r and sums_in_float32(config):
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    return {"timers": NO_TIMER} | config | {"steps_per_print": 10**9}


def schedule(section, args, steps, path):
    """resolve()'s values of a ds_config's scheduler, which must be the one that the run makes itself.

    Warm-up is linear, as in transformers' schedulers of these names.
    """
    kind = section.get("type", "auto")
    ours = SCHEDULERS.get(kind, args.lr_scheduler_type if kind == "auto" else None)
    if ours is None:
        raise InputError(
            f"{path}: scheduler.type {json.dumps(kind)} is not supported, expected one of {', '.join(SCHEDULERS)}; "
            "remove scheduler, and use --lr_scheduler_type"
        )
    if ours != args.lr_scheduler_type:
        raise InputError(
            f'{path}: "scheduler.type" is "{kind}", which is --lr_scheduler_type {ours}, but the run says '
            f"{args.lr_scheduler_type}; remove scheduler, or give the run that value"
        )
    values = {
        "type": (kind, "lr_scheduler_type"),
        "params.warmup_min_lr": (0, "0"),
        "params.warmup_max_lr": (args.learning_rate, "learning_rate"),
        "params.warmup_num_steps": (math.ceil(args.warmup_ratio * steps), "warmup_ratio x steps"),
        "params.warmup_type": ("linear", "linear"),
        "params.total_num_steps": (steps, "steps"),
    }
    return {f"scheduler.{name}": value for name, value in values.items()}


def sums_in_float32(config):
    """Whether LoRA's gradients are summed in float32 over the backward passes of a step: two bytes more an element.

    In bfloat16 an addend below 1/512 of the sum is lost. ZeRO-0 refuses it. ZeRO-2 with its optimizer offloaded never
    clears such a sum after a step that is skipped (DeepSpeed 0.19.8, stage_1_and_2.py, reset_cpu_buffers).
    """
    bf16 = config["bf16"]
    stage = config["zero_optimization"]["stage"]
    return stage == 3 and bf16["enabled"] and not bf16.get("bf16_master_weights_and_grads")


def scoring_config(config, model_args):
    """The configuration that streams a frozen model under ZeRO-3: parameters only, no optimizer."""
    zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": model_args.use_mixed_precision == "bf16"},
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "timers": config.get("timers", NO_TIMER),
    }
