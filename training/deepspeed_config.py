"""Read a ds_config, refuse what contradicts the run, and fill in what it leaves as "auto".

ds_configs/*.json -> read_ds_config() -> training_config() or scoring_config() -> deepspeed.initialize
"""

import json
import math
from pathlib import Path
from typing import Annotated, get_args

import pydantic
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum

from cli.parser import nearest
from files import InputError, each_once
from training import nvme

# What a ds_config may hold here: {name: type, or the names of a section}. DeepSpeed itself accepts any name at the top
# and in optimizer.params, and ignores those that it does not know.
INTEGERS = "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print"
NUMBERS = "gradient_clipping gradient_predivide_factor"
SWITCHES = """zero_allow_untested_optimizer zero_force_ds_cpu_optimizer prescale_gradients wall_clock_breakdown
    memory_breakdown dump_state"""
TEXTS = "communication_data_type log_level"
OBJECTS = """activation_checkpointing aio checkpoint comms_logger csv_monitor data_types flops_profiler tensorboard
    timers wandb"""
ADAM_NUMBERS = "lr eps weight_decay"
ADAM_SWITCHES = "torch_adam adam_w_mode bias_correction fp32_optimizer_states"
ADAM = {
    **dict.fromkeys(ADAM_NUMBERS.split(), float),
    **dict.fromkeys(ADAM_SWITCHES.split(), bool),
    "betas": tuple[float, float],
}
SECTIONS = {
    **dict.fromkeys(INTEGERS.split(), int),
    **dict.fromkeys(NUMBERS.split(), float),
    **dict.fromkeys(SWITCHES.split(), bool),
    **dict.fromkeys(TEXTS.split(), str),
    **dict.fromkeys(OBJECTS.split(), dict),
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "zero_optimization": DeepSpeedZeroConfig,
    "optimizer": {"type": str, "params": ADAM, "legacy_fusion": bool},
}

NO_TIMER = {"throughput": {"enabled": False}}  # by default DeepSpeed's waits for the device in each forward pass


# --- reading ----------------------------------------------------------------------------------------------


def read_ds_config(path):
    """The ds_config at `path`, its names and types checked; without a path, stage 0 and torch's AdamW.

    Raises InputError for a file that cannot be read, and for what DeepSpeed would ignore or refuse later.
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
    check_precision(config, path)
    check_stage(config, path)
    check_nvme(config, path)
    return config


def not_a_number(name):
    """json.load calls this for NaN and Infinity."""
    raise ValueError(f"{name} is not a number")


def check_precision(config, path):
    """Refuse fp16, and bf16 settings that contradict each other or the stage."""
    if config.get("fp16", {}).get("enabled"):
        raise InputError(f"{path}: fp16 is not supported (its range is too small for these scores); use bf16")
    bf16, stage = config.get("bf16", {}), config.get("zero_optimization", {}).get("stage")
    masters = bf16.get("bf16_master_weights_and_grads")
    if masters and stage == 0:
        raise InputError(f"{path}: bf16.bf16_master_weights_and_grads needs a ZeRO stage of 1 at least")
    if bf16.get("bf16_optimizer_states") and not masters:
        raise InputError(f"{path}: bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads")


def check_stage(config, path):
    """Refuse a missing stage, an offload that the stage does not have, and what DeepSpeed refuses itself."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage")
    if stage not in (0, 1, 2, 3):  # missing, or "auto"
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
    """A copy of `config` with the run's values in place of "auto".

    values: {"a.b.c": (value, flag)}. Raises InputError for a literal that is not the run's value, and for an "auto"
    that no value fills.
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
    for dotted in places_of_auto(config):
        raise InputError(f'{path}: "{dotted}" is "auto", which this project does not fill in; write a number')
    return config


def places_of_auto(section, where=""):
    """Yields "a.b.c" for each "auto" in a section."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from places_of_auto(value, f"{where}{key}.")
        elif value == "auto":
            yield where + key


def training_config(config, args, model_args, path):
    """The configuration of the policy's engine."""
    if str(config.get("optimizer", {}).get("type")).lower() == "adafactor":
        raise InputError(
            f"{path}: optimizer.type Adafactor is refused: ZeRO gives an optimizer flat vectors, without the rows and "
            'columns that Adafactor factors, so it would save nothing; write "AdamW" (ds_configs/README.md: bytes per '
            "parameter)"
        )
    values = {
        "train_micro_batch_size_per_gpu": (args.per_device_train_batch_size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (args.gradient_accumulation_steps, "gradient_accumulation_steps"),
        "gradient_clipping": (args.max_grad_norm, "max_grad_norm"),
        "bf16.enabled": (model_args.use_mixed_precision == "bf16", "use_mixed_precision == bf16"),
        "optimizer.type": ("AdamW", "optimizer"),
        "optimizer.params.lr": (args.learning_rate, "learning_rate"),
        "optimizer.params.betas": ([args.adam_beta1, args.adam_beta2], "adam_beta1, adam_beta2"),
        "optimizer.params.weight_decay": (args.weight_decay, "weight_decay"),
    }
    if nvme.is_used(config):
        folder = str(Path(args.output_dir, "nvme"))
        values["zero_optimization.offload_optimizer.nvme_path"] = (folder, "output_dir/nvme")
    config = resolve(config, values, path)
    config.pop("train_batch_size", None)
    # To DeepSpeed each backward pass is an accumulation step. Their number varies, so it is not told: we scale the loss
    # and set the boundary ourselves.
    config["gradient_accumulation_steps"] = 1
    if model_args.lora_r and sums_in_float32(config):
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    return {"timers": NO_TIMER} | config | {"steps_per_print": 10**9, "wall_clock_breakdown": False}


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
