"""Optimizer states on an SSD: DeepSpeed's offload_optimizer.device "nvme" (ZeRO-Infinity, arXiv 2104.07857).

    runs/NAME/nvme/zero_stage_3/optimizer/rank0/     master weights, moments, gradients: files of one sub-group each
    runs/NAME/checkpoints/step-N/                    the same files as with the states in host memory

A step reads each sub-group's states, updates them on the host and writes them back, by direct I/O into locked memory.
DeepSpeed 0.19.8 does not resume such a run: its checkpoints are copies of the files without Adam's step count, and the
moments are zero after a load. So mapped() makes the files ordinary tensors while a checkpoint is saved or loaded.
"""

import contextlib
import ctypes
import mmap
import os
import resource
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.ops.op_builder.cpu import AsyncIOBuilder  # plain C++: the one for CUDA asks for the CUDA toolkit
from torch.utils.serialization import config as serialization

from files import InputError
from training.footprint import sub_groups

FLOAT32 = 4
FILES = 4  # of each sub-group: master weights, two moments, the gradient
MOMENTS = ("exp_avg", "exp_avg_sq")
MEMORY, LENGTH = 512, 1024  # bytes: multiples of these are the addresses and lengths of direct I/O here


def is_used(config):
    """Whether a ds_config keeps optimizer states on an SSD."""
    return offload_of(config) == "nvme"


def offload_of(config):
    """Where a ds_config keeps optimizer states: none (with the parameters), cpu or nvme."""
    return (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")


# --- before and after the engine is built ---------------------------------------------------------------------------


def prepare(parameters, config):
    """Make the folder for the states of `parameters`; raise InputError if states or buffers do not fit this machine.

    config: that of the engine, with its nvme_path. Every rank must call it.
    """
    load_extension()
    zero = config["zero_optimization"]
    offload, folder = zero["offload_optimizer"], Path(zero["offload_optimizer"]["nvme_path"])
    numels = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
    if dist.get_rank() == 0:
        remove(folder)  # what a killed run left
        folder.mkdir(parents=True, exist_ok=True)
        check_disk(folder, sum(numels))
    dist.barrier()
    largest = max(sub_groups([numel / dist.get_world_size() for numel in numels], zero.get("sub_group_size", 10**9)))
    check_locked_memory(int(offload.get("buffer_count", 4) * FLOAT32 * largest))


def remove(folder):
    """Remove what DeepSpeed wrote to `folder`, which may be a link to another disk. What counts is in checkpoints."""
    shutil.rmtree(folder / "zero_stage_3", ignore_errors=True)
    with contextlib.suppress(OSError):  # a link, or not there
        folder.rmdir()


def load_extension():
    """Load DeepSpeed's async_io, which is compiled the first time. Raises InputError if it cannot be."""
    try:
        AsyncIOBuilder().load()
    except RuntimeError as error:
        raise InputError(
            f"DeepSpeed's async_io did not compile ({str(error).splitlines()[0]}); optimizer states on an SSD need "
            "libaio: apt install libaio-dev, then run the same command again"
        ) from None


def check_disk(folder, trained):
    """Raise InputError if `folder` has no room for the states of `trained` elements, or no direct I/O."""
    needed, free = FILES * FLOAT32 * trained, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: the optimizer states need {needed / 1e9:.2f} GB there and {free / 1e9:.2f} are free; free "
            "some space, or give an --output_dir on another SSD"
        )
    trial, memory = folder / "trial", mmap.mmap(-1, 4096)
    try:
        file = os.open(trial, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        os.writev(file, [memoryview(memory)[MEMORY : MEMORY + LENGTH]])
        os.close(file)
    except OSError as error:
        raise InputError(
            f"{folder}: its file system has no direct I/O of {LENGTH} bytes ({error.strerror}), by which optimizer "
            "states are swapped; give an --output_dir on a local SSD with ext4 or xfs"
        ) from None
    trial.unlink()


def check_locked_memory(size):
    """Raise InputError if this process may not lock `size` bytes; DeepSpeed would end it without a message."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.byref(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mlock(start, ctypes.c_size_t(size)):
        raise InputError(
            f"{size / 1e9:.1f} GB of memory cannot be locked, which swapping optimizer states needs; raise the limit "
            "(ulimit -l; memlock in /etc/security/limits.conf), log in again, and run the same command",
            local=True,
        )


def reserve(engine):
    """Take the disk space of an engine's swap files, and refuse a model whose gradients cannot be read back.

    DeepSpeed 0.19.8 does not look at the result of a read or a write (csrc/aio/common/deepspeed_aio_common.cpp): a full
    disk or a buffer that is not aligned would only change the numbers.
    """
    optimizer, swapper = engine.optimizer, engine.optimizer.optimizer_swapper
    for parameter, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups):
        info = swapper.swap_params_info.get(swapper.parameter_id(parameter))
        if info is None:  # a small one, which stays in host memory
            continue
        size = FLOAT32 * swapper._io_aligned_numel(info.numel())
        for moment in MOMENTS:
            allocate(Path(swapper.swap_folder, f"{moment}-{info.param_id}.tensor.swp"), size)
        offset = 0
        for numel in (each.partition_numel() for each in group):
            if swapper.is_swappable_tensor(numel=numel):
                if offset * FLOAT32 % MEMORY:
                    raise InputError(
                        f"optimizer states on an SSD need tensors of multiples of {MEMORY // FLOAT32} elements, which "
                        "this model's are not; use ds_configs/zero3_offload_4080.json",
                        local=True,
                    )
                length = numel - numel % swapper.numel_alignment  # the rest stays in memory
                [path] = info.get_or_create_gradient_paths([offset], [length])
                allocate(Path(path), FLOAT32 * length)
            offset += numel


def allocate(path, size):
    """Make a file of `size` bytes of zeros that are reserved on the disk."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); free some space", local=True) from None


# --- checkpoints ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mapped(engine):
    """Context in which an engine's swapped states are tensors that are backed by their files.

    DeepSpeed then saves and loads them as those in host memory: a checkpoint does not depend on the device, and can be
    converted for other ranks. Pages are read and written as they are used, so that it takes no memory.
    """
    optimizer = engine.optimizer
    if not getattr(optimizer, "swap_optimizer", False):
        yield
        return
    swapper = optimizer.optimizer_swapper
    known = {key: list(info.tensors) for key, info in swapper.swap_params_info.items()}
    for key, info in swapper.swap_params_info.items():
        for each in known[key]:
            each.compute_tensor.data = on_disk(each.swap_path, info, swapper)[: info.numel()]
    optimizer.swap_optimizer, mmap_before, serialization.load.mmap = False, serialization.load.mmap, True
    try:
        yield
        for parameter in optimizer.fp32_partitioned_groups_flat:
            info = swapper._get_param_swap_info(parameter)  # with the moments that were loaded
            for each in info.tensors[len(known[info.param_id]) :] if info else []:
                on_disk(each.swap_path, info, swapper)[: info.numel()].copy_(each.compute_tensor)
    finally:
        optimizer.swap_optimizer, serialization.load.mmap = True, mmap_before
        for info in swapper.swap_params_info.values():
            info.release_memory()


def on_disk(path, info, swapper):
    """The tensor in a swap file, (numel,) with padding for direct I/O. A file that is not there is created."""
    size = swapper._io_aligned_numel(info.numel())
    return torch.from_file(path, shared=True, size=size, dtype=info.dtype())
