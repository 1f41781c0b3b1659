"""Read a ds_config, refuse what contradicts the run, and fill in what it leaves as "auto"."""

import json
import math
from typing import Annotated, get_args

import pydantic
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum

from cli.parser import nearest
from files import InputError, each_once

# What a ds_config may hold here; DeepSpeed itself takes any name at the top and in optimizer.params, and passes over it
ADAM = {
    "lr": float,
    "betas": tuple[float, float],
    "eps": float,
    "weight_decay": float,
    "torch_adam": bool,
    "adam_w_mode": bool,
    "bias_correction": bool,
    "fp32_optimizer_states": bool,
}


SECTIONS = {
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print"), int
    ),
    **dict.fromkeys(("gradient_clipping", "gradient_predivide_factor"), float),
    **dict.fromkeys(
        (
            "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer",
            "prescale_gradients",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
        ),
        bool,
    ),
    **dict.fromkeys(("communication_data_type", "log_level"), str),
    **dict.fromkeys(
        (
            "activation_checkpointing",
            "aio",
            "checkpoint",
            "comms_logger",
            "csv_monitor",
            "data_types",
            "flops_profiler",
            "tensorboard",
            "timers",
            "wandb",
        ),
        dict,
    ),
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "zero_optimization": DeepSpeedZeroConfig,
    "optimizer": {"type": str, "params": ADAM, "legacy_fusion": bool},
}


def read_ds_config(path):
    """The ds_config at `path`, its names and types checked; stage 0 and torch's AdamW when no path is given."""
    if not path:
        return {"optimizer": {"params": {"torch_adam": True}}, "zero_optimization": {"stage": 0}}
    try:
        with open(path, encoding="utf-8-sig") as file:
            config = json.load(file, object_pairs_hook=each_once, parse_constant=no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); see ds_configs/README.md") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object; see ds_configs/README.md")
    check_names(config, SECTIONS, path)
    zero, bf16 = config.get("zero_optimization", {}), config.get("bf16", {})
    if (stage := zero.get("stage")) not in (0, 1, 2, 3):  # left out, or "auto"
        raise InputError(f"{path}: zero_optimization.stage is {stage}, expected 0, 1, 2 or 3; see ds_configs/README.md")
    if config.get("fp16", {}).get("enabled"):
        raise InputError(f"{path}: fp16 is not supported (its range is too small for these scores); use bf16")
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if (zero.get(name) or {}).get("device", "none") != "none" and stage < least:
            raise InputError(f"{path}: zero_optimization.{name} needs stage {least} at least, and stage is {stage}")
    masters, states = "bf16_master_weights_and_grads", "bf16_optimizer_states"
    if bf16.get(masters) and not stage or bf16.get(states) and not bf16.get(masters):
        raise InputError(
            f"{path}: bf16.{masters} needs a ZeRO stage of 1 at least, and bf16.{states} needs bf16.{masters}"
        )
    try:
        DeepSpeedZeroConfig(**zero)  # what DeepSpeed itself says of its parts together
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise InputError(f"{path}: {where}: {first['msg']}; see ds_configs/README.md") from None
    return config


def no_number(name):
    raise ValueError(f"{name} is no number")


def names_of(known):
    """{name: type or field} of a section: of a dict as it is, of DeepSpeed's model each field under its name and its alias."""
    if isinstance(known, dict):
        return known
    return {name: field for own, field in known.model_fields.items() for name in (own, field.alias) if name}


def check_names(section, known, path, where=""):
    """Refuse a name that DeepSpeed does not know, and a value of another type than its own; "auto" is left to resolve()."""
    known = names_of(known)
    for name, value in section.items():
        dotted, field = f"{where}{name}", known.get(name)
        if field is None:
            mend = nearest(name, known, "see ds_configs/README.md", 0.6)
            raise InputError(f"{path}: unknown key {json.dumps(dotted)}{mend}")
        more = getattr(field, "json_schema_extra", None) or {}
        if more.get("deprecated"):
            raise InputError(f"{path}: {dotted} is deprecated, write {more.get('new_param')}; see ds_configs/README.md")
        kind = getattr(field, "annotation", field)  # Optional[a model of DeepSpeed's]: that model
        inner = next(
            (
                each
                for each in (kind, *get_args(kind))
                if isinstance(each, dict) or DeepSpeedConfigModel in getattr(each, "__mro__", ())
            ),
            None,
        )
        if inner is not None and isinstance(value, dict):
            check_names(value, inner, path, f"{dotted}.")
        elif value != "auto" and (wrong := complaint(value, kind, getattr(field, "metadata", ()))):
            raise InputError(f"{path}: {dotted} is {json.dumps(value)}, {wrong}; see ds_configs/README.md")


def complaint(value, kind, limits):
    """What is wrong with a JSON value that should be of a type within limits; 1e8 is a whole number to DeepSpeed, "3" is none."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "expected a finite number"
        value = int(value) if value.is_integer() else value
    if kind is ZeroStageEnum:  # true would be stage 1
        return None if type(value) is int and 0 <= value <= 3 else "expected 0, 1, 2 or 3"
    if isinstance(kind, dict) or {dict, DeepSpeedConfigModel} & {*getattr(kind, "__mro__", ())}:
        return None if kind is dict and isinstance(value, dict) else "expected an object"
    try:
        pydantic.TypeAdapter(Annotated[(kind, *limits)] if limits else kind).validate_json(
            json.dumps(value), strict=True
        )
    except pydantic.ValidationError as error:
        return error.errors()[0]["msg"].replace("Input should be", "expected")


def resolve(config, values, path):
    """Fill every "auto" of `config` from `values` {"a.b.c": (value, flag)}; a literal must equal the run's value."""
    config = json.loads(json.dumps(config))
    for dotted, (value, flag) in values.items():
        *parents, key = dotted.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        if place.setdefault(key, "auto") not in ("auto", value):
            raise InputError(
                f'{path}: "{dotted}" is {json.dumps(place[key])}, but the run says {flag} = '
                f'{json.dumps(value)}; write "auto" there, or give the run that value'
            )
        place[key] = value
    if left := [dotted for dotted in paths_of(config, "auto")]:
        raise InputError(f'{path}: "{left[0]}" is "auto", which this project does not fill in; write a number')
    return config


def paths_of(value, wanted, prefix=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths_of(item, wanted, f"{prefix}.{key}" if prefix else key)
    elif value == wanted:
        yield prefix


def training_config(config, args, model_args, backwards, path):
    """The configuration of the policy's engine. `backwards`: backward passes per optimizer step."""
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
    if str(config.get("optimizer", {}).get("type")).lower() == "adafactor":
        raise InputError(
            f"{path}: optimizer.type Adafactor is refused: ZeRO gives an optimizer flat vectors, without the rows and columns "
            'that it factors, so that it would save nothing; write "AdamW" (ds_configs/README.md: bytes per parameter)'
        )
    config = resolve(config, values, path)
    config.pop("train_batch_size", None)
    # To DeepSpeed each backward is one accumulation step: ZeRO-2's offload allocates its accumulation buffer only when
    # it expects more than one. The loss is scaled by us, and the boundary set by us.
    config["gradient_accumulation_steps"] = backwards
    return config | {"steps_per_print": 10**9, "wall_clock_breakdown": False}


def scoring_config(config, model_args):
    """The configuration that streams a frozen model under ZeRO-3: parameters only, no optimizer."""
    zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": model_args.use_mixed_precision == "bf16"},
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
    }
