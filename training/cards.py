"""The cards that torch can use, and what is said when a model does not fit on one."""

import contextlib

import torch

from files import InputError


def usable():
    """How many cards torch can use. Raises InputError if the machine has cards and torch can use none.

    device_count() asks NVML, which needs a driver of any age; is_available() asks the CUDA runtime, which refuses a
    driver older than the CUDA that torch is built for (torch/cuda/__init__.py).
    """
    seen = torch.cuda.device_count()
    if seen and not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, can use none of the {seen} card(s) here; "
            "to see why, run: bash launch.sh --check (to work on the CPU: DS_ACCELERATOR=cpu, or --device cpu)"
        )
    return seen


@contextlib.contextmanager
def loading(model):
    """Turn a lack of card memory while the weights of `model`, its name, are put there into a user's error."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(
            f"{model}: its weights do not fit on the card; add --deepspeed ds_configs/zero3_offload_4080.json, which "
            "streams them from the host, or --load_in_4bit true"
        ) from None
