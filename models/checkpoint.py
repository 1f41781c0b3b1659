"""Models and tokenizers: find, load, fingerprint, save. Strict: every tensor is accounted for by name and shape.

    model folder or hub name -> load_tokenizer(...), load_model(...) -> save_model(...) -> Hugging Face folder

Under ZeRO-3 the model is built partitioned (zero.Init) and filled one tensor at a time, so that an 8B model is never
whole in host memory twice. No remote code runs unless trust_remote_code is given; weights are safetensors only.
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
from models import architecture, families, folders, lora, quantized
from models.architecture import load_config
from models.folders import base_folder, model_fingerprint, model_folder, weight_files
from models.tensors import open_tensors

disable_progress_bar()  # ours are few and honest; this one would only flash by
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}  # by use_mixed_precision


def load_model(name, dtype, ds_config=None, trust_remote_code=False, shift_logits="auto", load_in_4bit=False):
    """The model in training mode with dropout 0, weights loaded strictly, an adapter beside them; partitioned as `ds_config` says.

    dtype: torch dtype of every parameter. ds_config: the resolved DeepSpeed configuration, or None for a plain model.
    shift_logits: yes, no or auto (families.shifted). load_in_4bit: the blocks in NF4 (quantized.py).
    Raises InputError naming the tensor that is unknown, missing or of another shape.
    """
    folder, config = base_folder(name), load_config(name, trust_remote_code)
    if trust_remote_code and getattr(config, "auto_map", None) and config.model_type not in families.KNOWN:
        print(
            f"warning: {folder} brings its own code, and --trust_remote_code lets it do whatever you may do on this machine",
            file=sys.stderr,
            flush=True,
        )
    for field in [
        key for key in config.to_dict() if "dropout" in key or key in ("attn_pdrop", "resid_pdrop", "embd_pdrop")
    ]:
        if isinstance(getattr(config, field, None), float):
            setattr(config, field, 0.0)  # a reference and a policy that draw dropout never agree
    shift, build = families.shifted(config, shift_logits), contextlib.nullcontext()
    if config.model_type in families.CAUSAL:
        config.shift_logits = shift  # saved with the model: the next script need not be told
    if ds_config and ds_config["zero_optimization"]["stage"] == 3:
        quantized.refuse_zero3(load_in_4bit, ds_config)
        import deepspeed

        build = deepspeed.zero.Init(config_dict_or_path=ds_config)  # its own dtype argument is ignored on a CPU
    with no_init_weights(), build:
        model = architecture.build(config, dtype, shift, trust_remote_code)
    if load_in_4bit:
        quantized.prepare(model, dtype)
    fill(model, folder)
    if (adapter := model_folder(name)) != folder:
        if folders.adapter_base(adapter).get("fingerprint", "") not in ("", model_fingerprint(str(folder))):
            raise InputError(f"{name}: an adapter to {folder} as it was; the weights there are others now")
        if (packed := folders.adapter_base(adapter).get("load_in_4bit", load_in_4bit)) != load_in_4bit:
            print(
                f"warning: {name} was trained on its base {'in 4 bits' if packed else 'in whole weights'}; this is a slightly other "
                f"model (--load_in_4bit {str(packed).lower()})",
                file=sys.stderr,
                flush=True,
            )
        model = lora.attach(model, adapter, writing)  # beside, not added: bfloat16 would round most of it away
    return model.train()


@torch.no_grad()
def fill(model, folder):
    """Copy every tensor of the folder's safetensors into the model, one at a time."""
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers()
    )  # tied: by every name
    with contextlib.ExitStack() as stack:
        where = {}
        for path in weight_files(folder).values():
            file = stack.enter_context(open_tensors(path))
            where.update({families.checkpoint_name(key): (file, key, path) for key in file.keys()})
        where.pop(None, None)
        check_tensors(parameters, where, folder)
        for name, (file, key, _) in where.items():
            with writing(parameters[name]) as mine:
                if mine:
                    parameters[name].copy_(file.get_tensor(key))
            quantized.pack(parameters[name])


def check_tensors(parameters, where, folder):
    if unknown := sorted(where.keys() - parameters.keys()):
        raise InputError(f"{folder}: tensor {unknown[0]} ({len(unknown)} in all) is not part of this architecture")
    have = {id(parameters[name]) for name in where}
    if missing := sorted(
        name for name, value in parameters.items() if id(value) not in have and isinstance(value, torch.nn.Parameter)
    ):
        raise InputError(f"{folder}: tensor {missing[0]} ({len(missing)} in all) is missing")
    for name, (file, key, path) in where.items():
        want = tuple(getattr(parameters[name], "ds_shape", parameters[name].shape))
        got = tuple(file.get_slice(key).get_shape())
        if got != want:
            raise InputError(f"{path}: tensor {key} has shape {list(got)}, expected {list(want)}")


@contextlib.contextmanager
def writing(parameter):
    """Context in which a parameter may be changed; yields whether by this rank. One that ZeRO-3 has cut is whole in it, and
    what rank 0 makes of it is dealt out again."""
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield torch.distributed.get_rank() == 0


def save_model(folder, model, state_dict, source, tokenizer, card, mask_id=None):
    """Write a Hugging Face folder (config, safetensors, tokenizer, README.md): all of it, or nothing.

    state_dict: whole tensors by name, as the engine gathers them. source: folder or hub name of the model that training started from;
    what its config.json says stays said. mask_id: noted there if the source left it to the tokenizer or the command line.
    """
    origin = model_folder(source) if source else None
    with replacing_folder(folder) as work:
        model.save_pretrained(work, state_dict={key: value.contiguous() for key, value in state_dict.items()})
        tokenizer.save_pretrained(work)
        saved = json.loads((work / "config.json").read_text())
        original = json.loads((origin / "config.json").read_text()) if source else {}
        kept = {
            key: value for key, value in original.items() if key not in ("transformers_version", "torch_dtype", "dtype")
        }
        if "auto_map" in kept:
            kept["auto_map"] = own_code(kept["auto_map"], source, work)
        noted = {} if mask_id is None else {"mask_token_id": mask_id}
        (work / "config.json").write_text(json.dumps(saved | noted | kept, indent=2) + "\n")
        (work / "README.md").write_text(card, encoding="utf-8")


def own_code(auto_map, source, work):
    """auto_map for a copy, in `work`, of the model `source`, so that whoever lets its own code run finds it: a folder's files are
    copied, unread; a hub name is put before each, as transformers writes it."""
    if os.path.isdir(source):
        for path in Path(source).glob("*.py"):
            if path.is_file() and path.resolve().suffix in (
                "",
                ".py",
            ):  # no link to something else; "": a file of the hub's cache
                shutil.copyfile(path, work / path.name)
        return auto_map
    named = lambda value: f"{source}--{value}" if isinstance(value, str) and "--" not in value else value  # noqa: E731
    return {name: [*map(named, value)] if isinstance(value, list) else named(value) for name, value in auto_map.items()}
