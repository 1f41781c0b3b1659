"""DeepSpeed behind a few functions: start the ranks, build an engine, make a step, gather the weights."""

import contextlib
import datetime
import fcntl
import functools
import glob
import importlib
import logging
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.cpp_extension import get_default_build_root

from files import InputError
from training import cards

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.device_count() else "cpu")  # before deepspeed's import
import cpuinfo  # noqa: E402
import deepspeed  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

from training import fetches, nvme  # noqa: E402


def without_compiling(*_, **__):
    """In place of DeepSpeed's compile decorator: leave the function as it is."""

    def unchanged(function):
        return function

    return unchanged


def without_extension():
    """In place of DeepSpeed's builder of deepspeed_shm_comm: build nothing."""


# A start on a CPU would compile and load it, though it only serves inference_all_reduce(), of tensor parallelism. The
# module is taken by its name, because deepspeed.comm's attribute `torch` is torch.
importlib.import_module("deepspeed.comm.torch").build_shm_op = without_extension
# Each start would take three seconds more: DeepSpeed looks at the CPU once for every extension, and prepares compilers
# for Muon, an optimizer that is not used here.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
compiler.compile = without_compiling


class Ranks(NamedTuple):
    """This process's rank, how many there are, and its device."""

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

    def most(self, *counts):
        """The largest of every rank's counts, each for itself: a list of integers."""
        return [max(each) for each in zip(*self.gather(counts))] if self.world > 1 else list(counts)

    def gather(self, value):
        """Every rank's `value` as a list, on every rank."""
        box = [None] * self.world
        dist.all_gather_object(box, value)
        return box


def send(array, device):
    """A numpy array as a tensor on `device`; to a GPU through pinned memory, so that nothing waits for the copy."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


def clear_stale_locks():
    """Remove the locks of compiled extensions that no process holds open.

    The process that took such a lock was killed. torch would wait for it for ever at the next start, without a message.
    """
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if not folder.is_dir():
        return
    with open(folder / ".cleaner", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # one cleaner at a time: another's new lock is not removed
        locks = list(folder.rglob("lock"))
        open_files = files_held_open() if locks else set()
        for lock in locks:
            if str(lock.resolve()) not in open_files:
                lock.unlink(missing_ok=True)


def files_held_open():
    """The paths of all files that processes of this machine hold open."""
    paths = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            paths.add(os.readlink(link))
    return paths


def start():
    """Join the ranks that a launcher started (RANK, WORLD_SIZE, ...), or be the only one. Returns the Ranks."""
    deepspeed_logger.setLevel(logging.WARNING)
    clear_stale_locks()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
    cuda = os.environ["DS_ACCELERATOR"] == "cuda" and cards.usable() > 0
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            os.environ.setdefault(name, str(value))
        # hours: the others wait while rank 0 writes an 8B model
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2), **alone)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave():
    """Leave the process group, if there is one. Returns 0, the exit code."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


def build(model, config):
    """The DeepSpeed engine of `model`; if `config` names an optimizer, for the parameters that require a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = trainable if "optimizer" in config else None
    if nvme.is_used(config):
        nvme.prepare(trainable, config)
    try:
        engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
    except AttributeError as error:
        if "ds_opt_adam" not in str(error):
            raise
        raise InputError(
            "DeepSpeed's CPU Adam did not compile; see its message above. It needs a C++ compiler and Python.h "
            "(apt install g++ python3-dev), then run: bash launch.sh --setup"
        ) from None
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        forget_first_step(engine.optimizer)
    if nvme.is_used(config):
        nvme.reserve(engine)
    if engine.zero_optimization_stage() == 3:
        fetches.streamed(engine)
    return engine


def forget_first_step(optimizer):
    """Undo the step with gradient 0 by which ZeRO-0 in bf16 creates its state: Adam would count from 2, and the weights
    have decayed once."""
    optimizer.optimizer.state.clear()
    for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups):
        for master, weight in zip(masters, weights):
            master.data.copy_(weight)


def step(engine):
    """One optimizer step. Returns the gradient's norm before clipping.

    A gradient that is not finite changes neither the weights nor the optimizer.
    """
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    if not gradients:  # ZeRO keeps them elsewhere, checks them itself, and knows the norm
        engine.step()
        return float(engine.get_global_grad_norm())
    norm = torch.nn.utils.get_total_norm(gradients)
    checks_itself = hasattr(engine.optimizer, "overflow")  # unlike plain AdamW, ZeRO-0's in float32
    if not checks_itself and not torch.isfinite(norm):
        engine.optimizer.zero_grad()
        return float(norm)
    engine.step()
    known = engine.get_global_grad_norm()
    return float(norm if known is None else known)


def recount(engine, steps):
    """Make DeepSpeed's CPU Adam continue to the last digit after a checkpoint of `steps` steps was loaded.

    It computes beta ** t by multiplying in float32, step by step, and does not save the product; after a load it would
    use pow(beta, t), which differs. So make as many steps on a dummy parameter.
    """
    adam = getattr(engine.optimizer, "optimizer", None)
    if not hasattr(adam, "ds_opt_adam"):
        return
    group, dummies = adam.param_groups[0], [torch.zeros(1) for _ in range(4)]
    settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
    for step in range(1, steps + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, step, *settings, *dummies)


def gathered(parameter):
    """Context in which a parameter that ZeRO-3 has partitioned can be read (to change it: checkpoint.writing)."""
    return deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else [])


def gather_weights(engine, ranks):
    """{name: CPU tensor} of the parameters that the engine trains, on rank 0, and {} elsewhere; one at a time."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue  # under LoRA: the base
        with gathered(parameter):
            if ranks.first:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights
