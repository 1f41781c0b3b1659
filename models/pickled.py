"""Convert a model of PyTorch pickles (pytorch_model*.bin) to safetensors, once, for a user who trusts it.

    python convert.py FOLDER OUT --allow_pickle

Reading a pickle may run any code that it names. torch's reader of weights (weights_only) refuses what it does not know.
Apart from DeepSpeed's own checkpoints, in folders that this project wrote, nothing else here reads pickles.
"""

import json
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from files import InputError, replacing_folder

COPIED = (".json", ".model", ".txt", ".jinja", ".md", ".py")  # configuration, tokenizer, model card, the model's code


def files_of(folder):
    """The pickles of a model's folder."""
    return sorted(Path(folder).glob("pytorch_model*.bin"))


def convert(folder, out):
    """Write `out`: the folder's small files, each pickle as a safetensors file, an index if there are several."""
    pickles = files_of(folder)
    if not pickles:
        raise InputError(f"{folder}: holds no pytorch_model*.bin; expected a model folder of PyTorch's pickles")
    with replacing_folder(out) as work:
        work.mkdir(parents=True)
        for path in Path(folder).iterdir():
            if path.is_file() and path.suffix in COPIED and not path.name.endswith(".index.json"):
                shutil.copyfile(path, work / path.name)
        file_of = {}  # {tensor name: file name}
        for path in pickles:
            name = path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            tensors = read(path)
            file_of |= dict.fromkeys(tensors, name)
            # Copies: tensors of a pickle may share memory, and safetensors refuses that.
            copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
            save_file(copies, work / name, metadata={"format": "pt"})
        if len(pickles) > 1:
            index = json.dumps({"metadata": {}, "weight_map": file_of}, indent=2)
            (work / "model.safetensors.index.json").write_text(index)


def read(path):
    """{name: tensor} of a pickle. Raises InputError if it is damaged or holds anything else."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: damaged, or not weights alone ({reason}); get the model from elsewhere") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InputError(f"{path}: holds other things than tensors by name; expected a model's weights")
    return tensors
