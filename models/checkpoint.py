"""Load a model's weights and save a trained model. Strict: every tensor is accounted for by name and shape.

    model folder or Hub name -> load_model(...) -> save_model(...) -> Hugging Face folder

Under ZeRO-3 the model is built partitioned (zero.Init) and filled one tensor at a time, so host memory never holds an
8B model twice. No remote code runs unless trust_remote_code is given; weights are read from safetensors only.
"""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from files import InputError, replacing_folder
from models import architecture, experts, families, lora, quantized
from models.architecture import load_config
from models.folders import adapter_base, base_folder, model_fingerprint, model_folder, weight_files
from models.tensors import open_tensors

disable_progress_bar()  # transformers' bar is gone before it can be read
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}  # by use_mixed_precision


def load_model(
    name, dtype, ds_config=None, trust_remote_code=False, shift_logits="auto", load_in_4bit=False, block_size="auto"
):
    """The model in training mode with dropout 0, its weights loaded strictly, an adapter beside them.

    dtype: torch dtype of every parameter. ds_config: the resolved DeepSpeed configuration, which says how to partition
    the model, or None for a plain model. shift_logits, block_size: what families.settle() takes. load_in_4bit: the
    blocks in NF4 (quantized.py). Raises InputError with the name of a tensor that is unknown, missing or of another
    shape.
    """
    folder, config = base_folder(name), load_config(name, trust_remote_code)
    if trust_remote_code and getattr(config, "auto_map", None) and config.model_type not in families.KNOWN:
        print(
            f"warning: {folder} brings its own code, and --trust_remote_code lets it do whatever you may do here",
            file=sys.stderr,
            flush=True,
        )
    without_dropout(config)
    shift = families.settle(config, shift_logits, block_size)
    with no_init_weights(), partitioned(ds_config, load_in_4bit):
        model = architecture.build(config, dtype, shift, trust_remote_code)
    if load_in_4bit:
        quantized.prepare(model, dtype)
    fill(model, folder)
    if (adapter := model_folder(name)) != folder:
        check_base(name, folder, adapter_base(adapter), load_in_4bit)
        model = lora.attach(model, adapter, writing)  # beside, not merged: bfloat16 would round most of it away
    return model.train()


@contextlib.contextmanager
def partitioned(ds_config, load_in_4bit):
    """Context in which a model is built: partitioned under ZeRO-3. A CPU ignores the dtype argument of zero.Init."""
    if not ds_config or ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    quantized.refuse_zero3(load_in_4bit, ds_config)
    import deepspeed
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    # zero.Init alone makes what torch.arange returns bfloat16, and so rounds the frequencies of rotary positions
    with prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=ds_config):
        yield


def without_dropout(config):
    """Set every dropout of a configuration to 0: with dropout, a reference and a policy never agree."""
    for field in config.to_dict():
        is_dropout = "dropout" in field or field in ("attn_pdrop", "resid_pdrop", "embd_pdrop")
        if is_dropout and isinstance(getattr(config, field, None), float):
            setattr(config, field, 0.0)


def check_base(name, folder, noted, load_in_4bit):
    """Refuse a base that has other weights than in the adapter's training; warn of one in another precision."""
    if noted.get("fingerprint") and noted["fingerprint"] != model_fingerprint(str(folder)):
        raise InputError(f"{name}: an adapter to {folder} as it was in training; the weights there have changed")
    was_4bit = noted.get("load_in_4bit", load_in_4bit)
    if was_4bit != load_in_4bit:
        flag = f"--load_in_4bit {str(was_4bit).lower()}"
        print(
            f"warning: {name} was trained with {flag}; without it, its base has slightly different weights",
            file=sys.stderr,
            flush=True,
        )


@torch.no_grad()
def fill(model, folder):
    """Copy every tensor of the folder's safetensors into the model, one at a time."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied one by each of its names
    parameters |= dict(model.named_buffers())
    with contextlib.ExitStack() as stack:
        stored = {}  # {name in the model: (file, name in the file, the file's path)}
        for path in weight_files(folder).values():
            file = stack.enter_context(open_tensors(path))
            stored |= {families.checkpoint_name(key): (file, key, path) for key in file.keys()}
        stored.pop(None, None)
        stacks = experts.file_names(model)
        check_tensors(parameters, stacks, model.state_dict().keys(), stored, folder)
        for name in sorted(parameters.keys() & (stored.keys() | stacks.keys())):  # a stack as a whole, then the next
            with writing(parameters[name]) as mine:
                targets = parameters[name].unbind(0) if mine and name in stacks else [parameters[name]]
                for target, piece in zip(targets, stacks.get(name, [name])):
                    if mine:
                        file, key, _ = stored[piece]
                        target.copy_(file.get_tensor(key))
            quantized.pack(parameters[name])


def check_tensors(parameters, stacks, needed, stored, folder):
    """Refuse tensors of a checkpoint that are unknown, missing, or of another shape than the model's.

    stacks: {name of a parameter that files hold in pieces: their names} (experts.file_names). needed: the names that
    are not computed, as some buffers are.
    """
    owners = {piece: name for name, pieces in stacks.items() for piece in pieces}
    owners |= {name: name for name in parameters.keys() - stacks.keys()}
    if unknown := sorted(stored.keys() - owners.keys()):
        raise InputError(f"{folder}: tensor {unknown[0]} ({len(unknown)} in all) is not part of this architecture")
    filled = {id(parameters[name]) for name in stored.keys() & parameters.keys()}
    missing = [
        name
        for name, owner in owners.items()
        if name not in stored and id(parameters[owner]) not in filled and owner in needed
    ]
    if missing:
        raise InputError(f"{folder}: tensor {min(missing)} ({len(missing)} in all) is missing")
    for name, (file, key, path) in stored.items():
        owner = owners[name]
        want = list(getattr(parameters[owner], "ds_shape", parameters[owner].shape))
        want = want[1:] if owner in stacks else want
        got = list(file.get_slice(key).get_shape())
        if got != want:
            raise InputError(f"{path}: tensor {key} has shape {got}, expected {want}")


@contextlib.contextmanager
def writing(parameter):
    """Context in which a parameter may be changed; yields whether by this rank.

    One that ZeRO-3 has partitioned is gathered; what rank 0 writes is then partitioned again.
    """
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield torch.distributed.get_rank() == 0


def save_model(folder, model, state_dict, source, tokenizer, card, mask_id=None):
    """Write a Hugging Face folder (config, safetensors, tokenizer, README.md), complete or not at all.

    state_dict: {name: tensor}, not partitioned, as the engine gathers them. source: folder or Hub name of the model
    that training started from, whose fields of config.json are kept, or None. mask_id: added to config.json if the
    source's has none.
    """
    origin = model_folder(source) if source else None
    constants = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    with replacing_folder(folder) as work:
        tensors = experts.split(model, state_dict | constants)
        model.save_pretrained(work, state_dict={key: value.contiguous() for key, value in tensors.items()})
        tokenizer.save_pretrained(work)
        fields = json.loads((work / "config.json").read_text())
        if mask_id is not None:
            fields["mask_token_id"] = mask_id
        if origin:
            original = json.loads((origin / "config.json").read_text())
            if "auto_map" in original:
                original["auto_map"] = own_code(original["auto_map"], source, work)
            changing = ("transformers_version", "torch_dtype", "dtype")
            fields |= {key: value for key, value in original.items() if key not in changing}
        (work / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        (work / "README.md").write_text(card, encoding="utf-8")


def own_code(auto_map, source, work):
    """auto_map for `work`, a copy of the model `source`, so that a user who trusts the model's own code can run it.

    The code of a folder is copied, not read. A Hub name is put before each entry, as transformers writes it.
    """
    if os.path.isdir(source):
        for path in Path(source).glob("*.py"):
            # A link must lead to Python code or, in the Hub's cache, to a file without a suffix.
            if path.is_file() and path.resolve().suffix in ("", ".py"):
                shutil.copyfile(path, work / path.name)
        return auto_map

    def at_source(entry):
        return f"{source}--{entry}" if isinstance(entry, str) and "--" not in entry else entry

    return {
        name: list(map(at_source, entry)) if isinstance(entry, list) else at_source(entry)
        for name, entry in auto_map.items()
    }
