"""Find, load, fingerprint and save models and tokenizers. Strict: every tensor is accounted for by name and shape.

    model folder or hub name -> load_tokenizer(...), load_model(...) -> save_model(...) -> Hugging Face folder

Under ZeRO-3 the model is built partitioned (zero.Init) and filled one tensor at a time, so that an 8B model is never
whole in host memory twice. No remote code runs unless trust_remote_code is given; weights are safetensors only.
"""
import contextlib
import inspect
import json
import os
import shutil
from pathlib import Path

import jinja2
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

import llada  # noqa: F401  registers model_type llada
from packed import InputError, fingerprint, read_json

disable_progress_bar()  # ours are few and honest; this one would only flash by
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}  # by use_mixed_precision


def model_folder(name):
    """The local folder of a model: `name` itself, or its download from the hub."""
    if not name:
        raise InputError("no model given; add --model_name_or_path FOLDER_OR_HUB_NAME")
    if os.path.isdir(name):
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"{name}: holds no config.json; expected a Hugging Face model folder")
        return Path(name)
    if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name}: no such model folder (and not a hub name such as GSAI-ML/LLaDA-8B-Instruct)")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub's client raises dozens of kinds; each ends here as one sentence
        raise InputError(f"{name}: neither a local folder nor to be had from the hub ({type(error).__name__})") from None


def load_config(name, trust_remote_code=False):
    folder = model_folder(name)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.json: {' '.join(str(error).split())[:300]}") from None


def load_tokenizer(name, trust_remote_code=False, **kwargs):
    """The folder's tokenizer through AutoTokenizer (tokenizer.json, or a sentencepiece tokenizer.model)."""
    folder = model_folder(name)
    load_config(name, trust_remote_code)
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer_config.json").exists():
        raise InputError(f"{folder}: its tokenizer.model needs a tokenizer_config.json beside it that names tokenizer_class "
                         "(LlamaTokenizer for SMDM), or it would be read wrongly")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: its tokenizer names no eos_token, which ends every response; "
                         "add it to tokenizer_config.json")
    return tokenizer


def response_tokenizer(name, tokenizer, trust_remote_code=False):
    """The tokenizer for text that follows other text: without sentencepiece's dummy prefix, where there is one."""
    if not tokenizer.convert_ids_to_tokens(encode(tokenizer, "x"))[0].startswith("\u2581"):
        return tokenizer
    return load_tokenizer(name, trust_remote_code, add_prefix_space=False)


def encode(tokenizer, text):
    """Ids of `text`, nothing added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def uses_chat(tokenizer, template):
    """Whether prompts go through the chat template: `template` is auto (if the tokenizer has one), chat or none."""
    if template == "chat" and not tokenizer.chat_template:
        raise InputError("--template chat: this tokenizer has no chat template; use --template none")
    return template != "none" and bool(tokenizer.chat_template)


def prompt_text(tokenizer, prompt, template):
    """The text that precedes a response: the raw string, or its rendering up to and with the assistant's header.

    prompt: a string (in a chat, one user message) or a list of {"role", "content"} messages, which needs a template.
    It holds every special token that it should: encode it with nothing added.
    """
    if not uses_chat(tokenizer, template):
        if isinstance(prompt, str):
            return prompt
        raise InputError("conversational rows need a chat template, and this tokenizer has none (or --template none)")
    return render(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def render(tokenizer, messages):
    """The chat template's text of `messages`, then the assistant's header."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refuses these messages ({error})") from None


def end_token_id(tokenizer, template):
    """What ends a response: the special token that the chat template puts after an assistant's message, else eos."""
    if uses_chat(tokenizer, template):
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "@answer@"}]
        rest = encode(tokenizer, render(tokenizer, messages).split("@answer@")[-1])
        added = tokenizer.added_tokens_decoder  # it holds sentencepiece's user-defined pieces too, which are plain text
        if rest and rest[0] in added and added[rest[0]].special:
            return rest[0]
    return tokenizer.eos_token_id


def mask_token_id(config, tokenizer):
    """The mask's id, from config.json's mask_token_id or the tokenizer's mask_token; never guessed."""
    found = getattr(config, "mask_token_id", None)
    found = tokenizer.mask_token_id if found is None else found
    if found is None:
        raise InputError("the model names no mask token: set mask_token_id in its config.json")
    return int(found)


def tokenizer_fingerprint(tokenizer):
    """Vocabulary, special tokens, template, and how a probe text is cut (merges and normalisation show there)."""
    probe = encode(tokenizer, "A probe: 1234 + 5 = 1,239\n\n  caf\u00e9 \u6f22\u5b57 <x>\t'quoted'")
    return fingerprint(sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens), probe,
                       tokenizer.get_chat_template() if tokenizer.chat_template else None)


def weight_files(folder):
    """{file name: path} of the folder's safetensors, from the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index, "downloading the model again").get("weight_map", {}).values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise InputError(f"{folder}: holds no *.safetensors weights")
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{folder}: its index names {name}, which is not there; download the model again")
    return {name: folder / name for name in names}


def model_fingerprint(name):
    """Of config.json and, per weight file, header, size and 64 sampled blocks of 64 KiB: seconds at 8B."""
    folder = model_folder(name)
    volatile = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "auto_map")
    config = read_json(folder / "config.json", "downloading the model again")
    parts = [{key: value for key, value in config.items() if key not in volatile}]
    for file_name, path in weight_files(folder).items():
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), size))
            parts += [file_name, size, header]
            for block in range(64):
                file.seek(block * max(size - 65536, 0) // 63)
                parts.append(file.read(65536))
    return fingerprint(*parts)


def load_model(name, dtype, ds_config=None, trust_remote_code=False):
    """The model in training mode with dropout 0, weights loaded strictly; partitioned as `ds_config` says.

    dtype: torch dtype of every parameter. ds_config: the resolved DeepSpeed configuration, or None for a plain model.
    Raises InputError naming the tensor that is unknown, missing or of another shape.
    """
    folder, config = model_folder(name), load_config(name, trust_remote_code)
    for field in [key for key in config.to_dict() if "dropout" in key or key in ("attn_pdrop", "resid_pdrop", "embd_pdrop")]:
        if isinstance(getattr(config, field, None), float):
            setattr(config, field, 0.0)  # a reference and a policy that draw dropout never agree
    build = contextlib.nullcontext()
    if ds_config and ds_config["zero_optimization"]["stage"] == 3:
        import deepspeed
        build = deepspeed.zero.Init(config_dict_or_path=ds_config)  # its own dtype argument is ignored on a CPU
    with no_init_weights(), build:
        model = AutoModelForMaskedLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()  # no_init_weights leaves that out, too
    if "targets" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{folder}: model_type {config.model_type} is not supported; expected llada")
    fill(model, folder)
    return model.train()


@torch.no_grad()
def fill(model, folder):
    """Copy every tensor of the folder's safetensors into the model, one at a time."""
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())  # tied names appear once
    aliases = set(model.state_dict().keys()) - parameters.keys()
    with contextlib.ExitStack() as stack:
        where = {}
        for path in weight_files(folder).values():
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except Exception as error:  # safetensors raises its own class for a torn header
                raise InputError(f"{path}: not a readable safetensors file ({error}); download it again") from None
            where.update({key: (file, path) for key in file.keys()})
        check_tensors(parameters, aliases, where, folder)
        for key, parameter in parameters.items():
            if key in where:
                copy_into(parameter, where[key][0].get_tensor(key))


def check_tensors(parameters, aliases, where, folder):
    if unknown := sorted(where.keys() - parameters.keys() - aliases):
        raise InputError(f"{folder}: tensor {unknown[0]} ({len(unknown)} in all) is not part of this architecture")
    if missing := sorted(key for key, value in parameters.items() if key not in where and value.requires_grad):
        raise InputError(f"{folder}: tensor {missing[0]} ({len(missing)} in all) is missing")
    for key, parameter in parameters.items():
        want = tuple(getattr(parameter, "ds_shape", parameter.shape))
        got = tuple(where[key][0].get_slice(key).get_shape()) if key in where else want
        if got != want:
            raise InputError(f"{where[key][1]}: tensor {key} has shape {list(got)}, expected {list(want)}")


def copy_into(parameter, tensor):
    """Fill a parameter, whole or partitioned by ZeRO-3 (rank 0 fills it, the engine deals it out)."""
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(tensor)
        return
    import deepspeed
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.copy_(tensor)


def save_model(folder, model, state_dict, source, tokenizer, card):
    """Write a Hugging Face folder (config, safetensors, tokenizer, README.md): all of it, or nothing.

    state_dict: whole tensors by name, as the engine gathers them. source: the model folder that training started from.
    """
    folder = Path(folder)
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    model.save_pretrained(work, state_dict={key: value.contiguous() for key, value in state_dict.items()})
    tokenizer.save_pretrained(work)
    saved, original = json.loads((work / "config.json").read_text()), json.loads((Path(source) / "config.json").read_text())
    saved.update({key: original[key] for key in ("auto_map", "architectures") if key in original})
    (work / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
    (work / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(work, folder)
