"""DeepSpeed behind four verbs: start the ranks, resolve a ds_config, build an engine, gather its weights.

ds_configs/*.json say where memory lives; what the run decides stands there as "auto" and is filled in here. A literal
that contradicts the run is refused, so that a value has one home.
"""
import contextlib
import datetime
import fcntl
import functools
import glob
import json
import logging
import math
import os
import resource
import warnings
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import pydantic
import torch
import torch.distributed as dist
from torch.utils.cpp_extension import get_default_build_root

import config as arguments
from packed import InputError
from sources import each_once

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # before deepspeed's import
import cpuinfo  # noqa: E402
import deepspeed  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.runtime.config_utils import DeepSpeedConfigModel  # noqa: E402
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # noqa: E402
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

# What every start would spend three seconds on: a look at the CPU for each extension, and compilers for Muon, which alone asks for them
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
compiler.compile = lambda *_, **__: lambda function: function

# What a ds_config may hold here; DeepSpeed itself takes any name at the top and in optimizer.params, and passes over it
ADAM = {"lr": float, "betas": tuple[float, float], "eps": float, "weight_decay": float, "torch_adam": bool, "adam_w_mode": bool,
        "bias_correction": bool, "fp32_optimizer_states": bool}
SECTIONS = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                     "steps_per_print"), int),
    **dict.fromkeys(("gradient_clipping", "gradient_predivide_factor"), float),
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients", "wall_clock_breakdown",
                     "memory_breakdown", "dump_state"), bool),
    **dict.fromkeys(("communication_data_type", "log_level"), str),
    **dict.fromkeys(("activation_checkpointing", "aio", "checkpoint", "comms_logger", "csv_monitor", "data_types",
                     "flops_profiler", "tensorboard", "timers", "wandb"), dict),
    "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config, "zero_optimization": DeepSpeedZeroConfig,
    "optimizer": {"type": str, "params": ADAM, "legacy_fusion": bool},
}
ROOM = 0.8  # the share of free memory that a trial may plan to fill


class Ranks(NamedTuple):
    rank: int
    world: int
    device: torch.device

    @property
    def first(self):
        return self.rank == 0

    def broadcast(self, value):
        """Rank 0's `value`, any picklable one, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value):
        """Every rank's `value` as a list, on every rank."""
        box = [None] * self.world
        dist.all_gather_object(box, value)
        return box


def send(array, device):
    """A numpy array as a tensor on `device`; to a GPU through pinned memory, so that the copy makes no one wait."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


def clear_stale_locks():
    """Remove the locks of compiled extensions that no process holds open: their owner was killed, and torch, which takes
    one at every start, would wait for it for ever, silently."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if not folder.is_dir():
        return
    with open(folder / ".cleaner", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # one at a time: a lock taken meanwhile by another is not removed
        locks, held = list(folder.rglob("lock")), set()
        for link in glob.glob("/proc/[0-9]*/fd/*") if locks else []:
            with contextlib.suppress(OSError):
                held.add(os.readlink(link))
        for lock in locks:
            if str(lock.resolve()) not in held:
                lock.unlink(missing_ok=True)


def start():
    """Join the ranks that a launcher made (RANK, WORLD_SIZE, ...), or be the only one."""
    deepspeed_logger.setLevel(logging.WARNING)
    clear_stale_locks()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            os.environ.setdefault(name, str(value))
        # hours: rank 0 writes a whole 8B model while the others wait
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2), **alone)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


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
        raise InputError(f"{path}: bf16.{masters} needs a ZeRO stage of 1 at least, and bf16.{states} needs bf16.{masters}")
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
            mend = arguments.nearest(name, known, "see ds_configs/README.md", 0.6)
            raise InputError(f"{path}: unknown key {json.dumps(dotted)}{mend}")
        more = getattr(field, "json_schema_extra", None) or {}
        if more.get("deprecated"):
            raise InputError(f"{path}: {dotted} is deprecated, write {more.get('new_param')}; see ds_configs/README.md")
        kind = getattr(field, "annotation", field)  # Optional[a model of DeepSpeed's]: that model
        inner = next((each for each in (kind, *get_args(kind)) if isinstance(each, dict)
                      or DeepSpeedConfigModel in getattr(each, "__mro__", ())), None)
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
        pydantic.TypeAdapter(Annotated[(kind, *limits)] if limits else kind).validate_json(json.dumps(value), strict=True)
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
            raise InputError(f'{path}: "{dotted}" is {json.dumps(place[key])}, but the run says {flag} = '
                             f'{json.dumps(value)}; write "auto" there, or give the run that value')
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
        raise InputError(f"{path}: optimizer.type Adafactor is refused: ZeRO gives an optimizer flat vectors, without the rows and columns "
                         'that it factors, so that it would save nothing; write "AdamW" (ds_configs/README.md: bytes per parameter)')
    config = resolve(config, values, path)
    config.pop("train_batch_size", None)
    # To DeepSpeed each backward is one accumulation step: ZeRO-2's offload allocates its accumulation buffer only when
    # it expects more than one. The loss is scaled by us, and the boundary set by us.
    config["gradient_accumulation_steps"] = backwards
    return config | {"steps_per_print": 10**9, "wall_clock_breakdown": False}


def scoring_config(config, model_args):
    """The configuration that streams a frozen model under ZeRO-3: parameters only, no optimizer."""
    zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
    return {"zero_optimization": zero, "bf16": {"enabled": model_args.use_mixed_precision == "bf16"},
            "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9}


def build(model, config):
    """The DeepSpeed engine of `model`; trains what requires a gradient if `config` names an optimizer."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        engine = deepspeed.initialize(model=model, model_parameters=trainable if "optimizer" in config else None,
                                      config=config)[0]
    except AttributeError as error:
        if "ds_opt_adam" not in str(error):
            raise
        raise InputError("DeepSpeed's CPU Adam did not compile; see its message above (a C++ compiler, and on a GPU "
                         "the CUDA toolkit of torch's version, are needed), then run: bash launch.sh --setup") from None
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):  # ZeRO-0 in bf16 makes its state by a step with gradient 0:
        engine.optimizer.optimizer.state.clear()  # Adam would count from 2, and the weights have decayed once
        for masters, weights in zip(engine.optimizer.fp32_groups, engine.optimizer.fp16_groups):
            for master, weight in zip(masters, weights):
                master.data.copy_(weight)
    return engine


def step(engine):
    """One optimizer step. Returns the gradient's norm before clipping; one that is not finite changes no weight, nor the optimizer."""
    whole = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(whole) if whole else None  # ZeRO-0 in float32 keeps them, and names no norm
    if norm is not None and not torch.isfinite(norm) and not hasattr(engine.optimizer, "overflow"):  # plain AdamW would take it
        engine.optimizer.zero_grad()
        return float(norm)
    engine.step()
    return float(norm if engine.get_global_grad_norm() is None else engine.get_global_grad_norm())


def recount(engine, steps):
    """Bring DeepSpeed's CPU Adam, once loaded, to the last digit of an uninterrupted run.

    It multiplies beta ** t up in float32, step by step, and does not save it; after a load it would take pow(beta, t).
    """
    adam = getattr(engine.optimizer, "optimizer", None)
    if hasattr(adam, "ds_opt_adam"):
        group, nothing = adam.param_groups[0], [torch.zeros(1) for _ in range(4)]
        for step in range(1, steps + 1):
            adam.ds_opt_adam.adam_update(adam.opt_id, step, group["lr"], *group["betas"], group["eps"],
                                         group["weight_decay"], group["bias_correction"], *nothing)


def whole(parameter):
    """Context in which a parameter is whole to be read, if ZeRO-3 has cut it (to change it: checkpoint.writing)."""
    return deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else [])


def gather_weights(engine, ranks):
    """{name: whole CPU tensor} of the parameters that the engine trains, on rank 0, {} elsewhere; one parameter at a time."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue  # under LoRA: the base
        with whole(parameter):
            if ranks.first:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def unborn(engine):
    """Bytes of Adam's moments, and of its step's temporary, that are not there before the first step (ZeRO-0 alone)."""
    if engine.zero_optimization_stage() or engine.optimizer is None:
        return 0
    return 12 * sum(parameter.numel() for parameter in engine.module.parameters() if parameter.requires_grad)


def grow(sizes, load, trial, ranks, later=0):
    """The largest of the ascending `sizes` that fits, on every rank: (size, its peak in GiB on this rank).

    trial(size) does the work; load(size) says in what proportion it takes memory; later: bytes to be left free. A size is tried only where what the one
    before it took, in proportion, would still leave room to spare: out of memory in the middle of a backward pass cannot be
    undone under ZeRO-3, so it is never met but with the first.
    """
    cuda = ranks.device.type == "cuda"
    for size, after in zip(sizes, [*sizes[1:], None]):
        if cuda:
            torch.cuda.reset_peak_memory_stats(ranks.device)
        before, free = memory_now(ranks.device)
        free -= later
        trial(size)
        peak = torch.cuda.max_memory_allocated(ranks.device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        if after is None or not all(ranks.gather((peak - before) * load(after) / load(size) < ROOM * free)):
            return size, peak / 2**30


def memory_now(device):
    """Bytes that this process holds, and bytes that it may still take."""
    if device.type == "cuda":
        held, (free, card) = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - held
        return held, min(free, torch.cuda.get_per_process_memory_fraction(device) * card - held)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    [free] = [int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    return held, free * 2**10 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def memory_peaks(device):
    """(GPU, host) peak in GiB of this process; None for the GPU on a CPU."""
    gpu = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return gpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
