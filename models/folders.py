"""Find a model's folder and weight files, read its configuration, fingerprint it. Imports no torch, so it is fast."""

import contextlib
import json
import os
import shlex
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import config
from files import InputError, file_sha256, fingerprint, naming, no_room, read_json
from models import families

ADAPTER_BASE = "base.json"  # ours, beside an adapter's files: what is to be known of its base (adapter_base)
# One of them is in every folder that holds a tokenizer
TOKENIZER = "tokenizer.json tokenizer_config.json tokenizer.model spiece.model vocab.json vocab.txt".split()
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
# Fields of config.json that may change while the model stays the same.
VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "auto_map")
BLOCKS, BLOCK_BYTES = 64, 64 << 10  # what model_fingerprint() samples of a weight file


def is_smdm_file(path):
    """Whether `path` is a file as SMDM's own code writes it, which convert.py makes a model folder of."""
    return Path(path).is_file() and str(path).endswith(".safetensors")


def model_folder(name):
    """The local folder of a model or an adapter: `name` itself, or its download from the Hub."""
    if not name:
        raise InputError("no model given; add --model_name_or_path FOLDER_OR_HUB_NAME")
    if os.path.isdir(name):
        if not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
            hint = " (SMDM's files: python convert.py)" if any(Path(name).glob("mdm-*.safetensors")) else ""
            raise InputError(f"{name}: holds no config.json; expected a Hugging Face model folder{hint}")
        return Path(name)
    if is_smdm_file(name):
        raise InputError(
            f"{name}: a file, expected a model folder; run: python convert.py {shlex.quote(name)} "
            f"{shlex.quote(f'weights/{Path(name).stem}')} --tokenizer TinyLlama/TinyLlama_v1.1"
        )
    if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name}: no such model folder (and not a Hub name such as GSAI-ML/LLaDA-8B-Instruct)")
    with downloading(f"{name} is not a local folder and could not be downloaded from the Hub"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))


@contextlib.contextmanager
def downloading(sentence):
    """A download inside that fails raises InputError: `sentence`, then the client's reason.

    A full disk stays an OSError. It names the cache of the Hub's client if the client names no file.
    """
    from huggingface_hub import constants

    try:
        with naming(constants.HF_HOME):
            yield
    except Exception as error:  # the Hub's client raises dozens of kinds; each ends here as one sentence
        if no_room(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{sentence} ({type(error).__name__}: {reason})") from None


def base_folder(name):
    """The folder of a model's own weights: for an adapter that of its base, as it was in training, else the model's."""
    folder = model_folder(name)
    return folder if read_adapter(folder) is None else base_of(folder)[1]


def base_of(adapter):
    """(folder or Hub name, local folder) of the base of the adapter in a folder: --base_model, or what its file names.

    Raises InputError with the file and its field where there is no such model.
    """
    if given := config.adapters.base_model:
        return given, model_folder(given)
    base = read_adapter(adapter).get("base_model_name_or_path")
    field = f"{adapter}/adapter_config.json: base_model_name_or_path is {json.dumps(base)}"
    mend = "give the adapter's base: --base_model FOLDER_OR_HUB_NAME"
    if not isinstance(base, str) or not base:
        raise InputError(f"{field}, which names no model; {mend}")
    if adapter_base(adapter).get("is_folder") and not os.path.isdir(base):
        raise InputError(f"{field}, a folder that is not here; {mend}")
    try:
        return base, model_folder(base)
    except InputError as error:
        raise InputError(f"{field}, and {error}; {mend}") from None


def tokenizer_folder(name):
    """The folder with a model's tokenizer: for an adapter that has none, as peft writes it, that of its base."""
    folder = model_folder(name)
    return folder if any((folder / file).is_file() for file in TOKENIZER) else base_folder(name)


def weight_files(folder):
    """{file name: path} of the folder's safetensors, from the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where = read_json(index, "downloading the model again").get("weight_map")
        names = sorted({str(name) for name in where.values()}) if isinstance(where, dict) else []
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise InputError(
            f"{folder}: holds no *.safetensors weights; pytorch_model*.bin are pickles, which may hold code: if you "
            f"trust them, run: python convert.py {shlex.quote(str(folder))} OUT --allow_pickle (for a model of the "
            "Hub, first run: hf download NAME --local-dir DIR)"
        )
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{folder}: its index names {name}, which is not there; download the model again")
    return {name: folder / name for name in names}


def model_fingerprint(name):
    """Hex digest of config.json and, per weight file, header, size and 64 sampled blocks of 64 KiB: seconds at 8B."""
    folder, model = base_folder(name), model_folder(name)
    config = config_fields(folder)
    parts = [{key: value for key, value in config.items() if key not in VOLATILE}]
    files = weight_files(folder)
    if model != folder:  # an adapter: its numbers, and those of its base
        adapter = read_adapter(model)
        parts.append([adapter.get(key) for key in ("r", "lora_alpha")])
        files["adapter"] = model / "adapter_model.safetensors"
    for file_name, path in files.items():
        parts += [file_name, *sampled(path)]
    return fingerprint(*parts)


def sampled(path):
    """[size, header, block, block, ...] of a safetensors file; the blocks are spread evenly over it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        parts = [size, file.read(min(header_bytes, size))]
        for block in range(BLOCKS):
            file.seek(block * max(size - BLOCK_BYTES, 0) // (BLOCKS - 1))
            parts.append(file.read(BLOCK_BYTES))
    return parts


def tokenizer_files(name):
    """Hex digest of a tokenizer's files and of the packages that read them: the same digest, the same tokenizer."""
    folder = tokenizer_folder(name)
    texts = [path for path in folder.iterdir() if path.suffix in (".json", ".model", ".txt", ".jinja")]
    digests = {path.name: file_sha256(path) for path in sorted(texts) if path.is_file()}
    return fingerprint([version(package) for package in ("transformers", "tokenizers", "sentencepiece")], digests)


def read_adapter(folder):
    """adapter_config.json of an adapter's folder; None where there is none."""
    path = Path(folder) / "adapter_config.json"
    return read_json(path, "saving the adapter again") if path.is_file() else None


def adapter_base(folder):
    """What training noted of an adapter's base: is_folder, fingerprint, shift_logits, block_size, mask_token_id,
    load_in_4bit.

    {} for an adapter that other software wrote.
    """
    path = Path(folder) / ADAPTER_BASE
    return read_json(path, "saving the adapter again") if path.is_file() else {}


def noted_fields(name, model_type):
    """{field: value} of the configuration that an adapter's training noted of its base; {} for a model."""
    noted, fields = adapter_base(model_folder(name)), {"mask_token_id": "mask_token_id"}
    if model_type in families.CAUSAL:
        fields["shift_logits"] = "shift_logits"
    if model_type in families.WITH_BLOCKS:
        fields["block_size"] = families.block_field(model_type)
    return {field: noted[key] for key, field in fields.items() if key in noted}


def config_fields(folder):
    """The fields of a folder's config.json."""
    return read_json(Path(folder) / "config.json", "downloading the model again")


def plain_config(name):
    """config.json's fields as attributes, with those noted of an adapter's base: what families.py's functions need.

    Unlike architecture.load_config() it fills in no defaults and checks nothing.
    """
    config = config_fields(base_folder(name))
    kind = families.model_type(config)
    return SimpleNamespace(**config | {"model_type": kind} | noted_fields(name, kind))
