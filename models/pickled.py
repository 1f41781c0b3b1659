"""A model whose weights are PyTorch's pickles (pytorch_model*.bin) made one of safetensors, once, on your word that you trust it.

    python convert.py FOLDER OUT --allow_pickle

A pickle may name any code to be run when it is read. torch's reader of weights alone (weights_only) refuses what it does not know;
nothing else here reads pickles but DeepSpeed's own checkpoints, in folders that this project wrote.
"""

import json
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from files import InputError, replacing_folder


def files_of(folder):
    """The pickles of a model's folder."""
    return sorted(Path(folder).glob("pytorch_model*.bin"))


def convert(folder, out):
    """Write `out`: the folder's small files as they are, each pickle as a safetensors file, an index if there are several."""
    if not (files := files_of(folder)):
        raise InputError(f"{folder}: holds no pytorch_model*.bin; expected a model folder of PyTorch's pickles")
    with replacing_folder(out) as work:
        work.mkdir(parents=True)
        for path in Path(folder).iterdir():
            if (
                path.is_file()
                and path.suffix in (".json", ".model", ".txt", ".jinja", ".md", ".py")
                and not path.name.endswith(".index.json")
            ):
                shutil.copyfile(path, work / path.name)
        where = {}
        for path in files:
            name = path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            tensors = read(path)
            save_file(
                {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()},
                work / name,
                metadata={"format": "pt"},
            )
            where |= dict.fromkeys(tensors, name)
        if len(files) > 1:
            (work / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": where}, indent=2)
            )


def read(path):
    """{name: tensor} of a pickle; whatever else it holds is refused."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise InputError(
            f"{path}: not weights alone, or torn ({' '.join(str(error).split())[:120]}); get the model from elsewhere"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InputError(f"{path}: holds other things than tensors by name; expected a model's weights")
    return tensors
