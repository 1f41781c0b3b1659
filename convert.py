"""Convert weights: SMDM's file to a model folder and back; pickles (pytorch_model*.bin) to safetensors.

    python convert.py mdm-1028M-1600e18.safetensors weights/smdm-1028M --tokenizer TinyLlama/TinyLlama_v1.1
    python convert.py weights/smdm-1028M mdm-1028M.safetensors
    python convert.py weights/pickled weights/safe --allow_pickle

Reading a pickle may run code, so --allow_pickle is needed. Even then it is read by torch's reader of
weights alone (weights_only).
"""

import os
from pathlib import Path

from cli import exits
from cli.parser import Parser
from files import InputError, check_new


def read_arguments(argv=None):
    """Namespace: source, out, tokenizer, n_heads, allow_pickle."""
    parser = Parser([], __doc__)
    parser.add_argument(
        "source",
        help="SMDM's file, such as mdm-1028M-1600e18.safetensors; or a folder that was made of one; or, with "
        "--allow_pickle, a folder of pytorch_model*.bin",
    )
    parser.add_argument("out", help="folder or .safetensors file to write, which must not exist yet")
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="folder or Hub name of the tokenizer, such as TinyLlama/TinyLlama_v1.1; "
        "required to convert SMDM's file to a folder",
    )
    parser.add_argument(
        "--n_heads", type=int, metavar="N", help="attention heads (default: as SMDM's released model of that width)"
    )
    parser.add_argument(
        "--allow_pickle", action="store_true", help="a folder of pytorch_model*.bin that you trust, to safetensors"
    )
    args = parser.parse_args(argv)
    check_new(args.out)
    return args


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from files import by_umask, naming, no_room
from models import folders, pickled, smdm
from models.architecture import load_config
from models.checkpoint import save_model
from models.folders import model_folder, weight_files
from models.tensors import read_tensors


def from_smdm(source, out, tokenizer, heads=None):
    """Convert an original file of SMDM to a Hugging Face folder.

    tokenizer: folder or Hub name. heads: as in smdm.config_of().
    """
    if not tokenizer:
        raise InputError("--tokenizer is missing: SMDM's is TinyLlama's; give a folder or TinyLlama/TinyLlama_v1.1")
    tensors = read_tensors(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    except (ValueError, OSError, KeyError, TypeError) as error:
        if no_room(error):
            raise
        raise InputError(f"--tokenizer {tokenizer}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    config = smdm.config_of({name: tuple(tensor.shape) for name, tensor in tensors.items()}, heads)
    ours = smdm.from_original(tensors, config.n_heads)
    with torch.device("meta"):
        model = smdm.SMDMModelLM(config)
    check_shapes(source, ours, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    save_model(out, model, ours, None, tokenizer, f"{Path(source).name} of SMDM, under LLaDA's tensor names.\n")


def to_smdm(source, out):
    """Convert a folder that from_smdm() or training wrote to one file that SMDM's own code reads."""
    folder, config = model_folder(source), load_config(source)
    if config.model_type != "smdm" or folders.read_adapter(folder):
        raise InputError(
            f"{source}: expected an original .safetensors file of SMDM, or a folder that was made of one (merge an "
            "adapter first: merge.py)"
        )
    tensors = {}
    for path in weight_files(folder).values():
        tensors |= read_tensors(path)
    Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{out}.tmp")
    try:
        with naming(out):
            save_file(smdm.to_original(tensors, config.n_heads), temporary)  # no second copy of the model in memory
        by_umask(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def check_shapes(path, tensors, shapes):
    """Refuse {name: tensor} that differ from {name: shape}."""
    for name in sorted(tensors.keys() | shapes.keys()):
        have = tuple(tensors[name].shape) if name in tensors else None
        if have != shapes.get(name):
            raise InputError(f"{path}: {name} has shape {have}, expected {shapes.get(name)} (tensors by LLaDA's names)")


def main(argv=None):
    args = read_arguments(argv)
    if args.allow_pickle:
        pickled.convert(args.source, args.out)
    elif folders.is_smdm_file(args.source):
        from_smdm(args.source, args.out, args.tokenizer, args.n_heads)
    else:
        to_smdm(args.source, args.out)
    print(f"{args.out}: {args.source} converted", flush=True)
    return 0


if __name__ == "__main__":
    exits.run(main)
