"""Reading safetensors files, with one clear sentence for a torn one."""

from safetensors import safe_open

from files import InputError


def open_tensors(path):
    """The safetensors file at `path`, opened; InputError if it is torn or none."""
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own class for a torn header
        raise InputError(f"{path}: not a readable safetensors file ({error}); download it again") from None


def read_tensors(path):
    """{name: tensor} of the safetensors file at `path`."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}
