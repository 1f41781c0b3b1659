"""Read safetensors files. A damaged one is an InputError of one sentence."""

from safetensors import safe_open

from files import InputError


def open_tensors(path):
    """The safetensors file at `path`, opened. Raises InputError if it is damaged or no such file."""
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own class for a damaged header
        raise InputError(f"{path}: not a readable safetensors file ({error}); download it again") from None


def read_tensors(path):
    """{name: tensor} of the safetensors file at `path`."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}
