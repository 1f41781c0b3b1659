"""DeepSpeed behind four verbs: start the ranks, resolve a ds_config, build an engine, gather its weights.

ds_configs/*.json say where memory lives; what the run decides stands there as "auto" and is filled in here. A literal
that contradicts the run is refused, so that a value has one home.
"""

import contextlib
import datetime
import fcntl
import functools
import glob
import logging
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.cpp_extension import get_default_build_root

from files import InputError

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # before deepspeed's import
import cpuinfo  # noqa: E402
import deepspeed  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

# What every start would spend three seconds on: a look at the CPU for each extension, and compilers for Muon, which alone asks for them
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
compiler.compile = lambda *_, **__: lambda function: function


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


def leave():
    """Part from the other ranks, if we have met."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


def build(model, config):
    """The DeepSpeed engine of `model`; trains what requires a gradient if `config` names an optimizer."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        engine = deepspeed.initialize(
            model=model, model_parameters=trainable if "optimizer" in config else None, config=config
        )[0]
    except AttributeError as error:
        if "ds_opt_adam" not in str(error):
            raise
        raise InputError(
            "DeepSpeed's CPU Adam did not compile; see its message above (a C++ compiler, and on a GPU "
            "the CUDA toolkit of torch's version, are needed), then run: bash launch.sh --setup"
        ) from None
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
    if (
        norm is not None and not torch.isfinite(norm) and not hasattr(engine.optimizer, "overflow")
    ):  # plain AdamW would take it
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
            adam.ds_opt_adam.adam_update(
                adam.opt_id,
                step,
                group["lr"],
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                group["bias_correction"],
                *nothing,
            )


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
