"""Find a model's folder and its weight files, and fingerprint them. Reads no weights and imports no torch."""

import os
from pathlib import Path

from files import InputError, fingerprint, read_json
from models import smdm


def model_folder(name):
    """The local folder of a model or an adapter: `name` itself, or its download from the hub."""
    if not name:
        raise InputError("no model given; add --model_name_or_path FOLDER_OR_HUB_NAME")
    if os.path.isdir(name):
        if not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise InputError(
                f"{name}: holds no config.json; expected a Hugging Face model folder"
                + (" (SMDM's files: python convert.py)" if any(Path(name).glob("mdm-*.safetensors")) else "")
            )
        return Path(name)
    if smdm.is_original(name):
        raise InputError(
            f"{name}: a file, expected a model folder; run: python convert.py {name} "
            f"models/{Path(name).stem} --tokenizer TinyLlama/TinyLlama_v1.1"
        )
    if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name}: no such model folder (and not a hub name such as GSAI-ML/LLaDA-8B-Instruct)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
            )
        )
    except Exception as error:  # the hub's client raises dozens of kinds; each ends here as one sentence
        raise InputError(
            f"{name}: neither a local folder nor to be had from the hub ({type(error).__name__})"
        ) from None


def base_folder(name):
    """The folder of a model's whole weights: an adapter's base, as it was when the adapter was trained, else the model's own."""
    folder = model_folder(name)
    if not (adapter := read_adapter(folder)):
        return folder
    base, noted = adapter.get("base_model_name_or_path"), adapter_base(folder)
    if noted.get("is_folder") and not os.path.isdir(base or ""):
        raise InputError(
            f"{name}: an adapter to the model folder {base}, which is not here; go where that path is right, or correct "
            "base_model_name_or_path in its adapter_config.json"
        )
    return model_folder(base)


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
            f"{folder}: holds no *.safetensors weights (of pytorch_model*.bin, pickles, which may hold code: if you trust "
            f"them, python convert.py {folder} OUT --allow_pickle; from the hub: hf download NAME --local-dir DIR)"
        )
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{folder}: its index names {name}, which is not there; download the model again")
    return {name: folder / name for name in names}


def model_fingerprint(name):
    """Of config.json and, per weight file, header, size and 64 sampled blocks of 64 KiB: seconds at 8B."""
    folder, model = base_folder(name), model_folder(name)
    volatile = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "auto_map")
    config = read_json(folder / "config.json", "downloading the model again")
    parts = [{key: value for key, value in config.items() if key not in volatile}]
    files = weight_files(folder)
    if model != folder:  # an adapter: its numbers, and those of its base
        adapter = read_adapter(model)
        parts.append([adapter.get(key) for key in ("r", "lora_alpha")])
        files["adapter"] = model / "adapter_model.safetensors"
    for file_name, path in files.items():
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), size))
            parts += [file_name, size, header]
            for block in range(64):
                file.seek(block * max(size - 65536, 0) // 63)
                parts.append(file.read(65536))
    return fingerprint(*parts)


ADAPTER_BASE = "base.json"  # ours, beside them


def read_adapter(folder):
    """adapter_config.json of an adapter's folder; None where there is none."""
    path = Path(folder) / "adapter_config.json"
    return read_json(path, "saving the adapter again") if path.is_file() else None


def adapter_base(folder):
    """What save() noted of the base: is_folder, fingerprint, shift_logits, mask_token_id, load_in_4bit; {} in others' adapters."""
    path = Path(folder) / ADAPTER_BASE
    return read_json(path, "saving the adapter again") if path.is_file() else {}
