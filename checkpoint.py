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

import jinja2
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

import families
import lora
import quantized
import smdm
from packed import InputError, fingerprint, open_tensors, read_json, replacing_folder

disable_progress_bar()  # ours are few and honest; this one would only flash by
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}  # by use_mixed_precision


def model_folder(name):
    """The local folder of a model or an adapter: `name` itself, or its download from the hub."""
    if not name:
        raise InputError("no model given; add --model_name_or_path FOLDER_OR_HUB_NAME")
    if os.path.isdir(name):
        if not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise InputError(f"{name}: holds no config.json; expected a Hugging Face model folder"
                             + (" (SMDM's files: python convert.py)" if any(Path(name).glob("mdm-*.safetensors")) else ""))
        return Path(name)
    if smdm.is_original(name):
        raise InputError(f"{name}: a file, expected a model folder; run: python convert.py {name} "
                         f"models/{Path(name).stem} --tokenizer TinyLlama/TinyLlama_v1.1")
    if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name}: no such model folder (and not a hub name such as GSAI-ML/LLaDA-8B-Instruct)")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]))
    except Exception as error:  # the hub's client raises dozens of kinds; each ends here as one sentence
        raise InputError(f"{name}: neither a local folder nor to be had from the hub ({type(error).__name__})") from None


def base_folder(name):
    """The folder of a model's whole weights: an adapter's base, as it was when the adapter was trained, else the model's own."""
    folder = model_folder(name)
    if not (adapter := lora.read(folder)):
        return folder
    base, noted = adapter.get("base_model_name_or_path"), lora.base_of(folder)
    if noted.get("is_folder") and not os.path.isdir(base or ""):
        raise InputError(f"{name}: an adapter to the model folder {base}, which is not here; go where that path is right, or correct "
                         "base_model_name_or_path in its adapter_config.json")
    return model_folder(base)


def load_config(name, trust_remote_code=False):
    """The configuration of a model, or of an adapter's base, with what was said of it when the adapter was trained."""
    folder = base_folder(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.json: {' '.join(str(error).split())[:300]}") from None
    noted = lora.base_of(model_folder(name))
    for field in ("mask_token_id", "shift_logits"):
        if field in noted and (field != "shift_logits" or config.model_type in families.CAUSAL):
            setattr(config, field, noted[field])
    return config


def load_tokenizer(name, trust_remote_code=False, **kwargs):
    """The folder's tokenizer through AutoTokenizer (tokenizer.json, or a sentencepiece tokenizer.model)."""
    folder = model_folder(name)
    load_config(name, trust_remote_code)
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer_config.json").exists():
        raise InputError(f"{folder}: its tokenizer.model needs a tokenizer_config.json beside it that names tokenizer_class "
                         "(LlamaTokenizer for SMDM), or it would be read wrongly")
    try:
        told = read_json(folder / "tokenizer_config.json", "downloading the model again") if (folder / "tokenizer_config.json").exists() else {}
        if same := families.TOKENIZERS.get(told.get("tokenizer_class")):
            tokenizer = getattr(transformers, same).from_pretrained(folder, **kwargs)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT's and its kin: what ends a text
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


def mask_token_id(config, tokenizer, given=None):
    """The mask's id: `given` (--mask_token_id), else config.json's mask_token_id, else the tokenizer's mask_token; never guessed."""
    found = given if given is not None else getattr(config, "mask_token_id", None)
    found = tokenizer.mask_token_id if found is None else found
    if found is None:
        raise InputError("the model names no mask token: give --mask_token_id, or set mask_token_id in its config.json")
    return int(found)


def prefix_ids(tokenizer, template):
    """Ids that the tokenizer puts before a text that no template renders, such as Llama's bos or BERT's [CLS]."""
    if uses_chat(tokenizer, template):
        return []
    whole, bare = tokenizer("x")["input_ids"], encode(tokenizer, "x")
    place = next(i for i in range(len(whole)) if whole[i:i + len(bare)] == bare)
    return whole[:place]


def prompt_ids(tokenizer, prompt, template):
    """The ids of prompt_text(): what comes before a response, in training and in sampling alike."""
    ids, prefix = encode(tokenizer, prompt_text(tokenizer, prompt, template)), prefix_ids(tokenizer, template)
    return ids if ids[:len(prefix)] == prefix else prefix + ids  # a text of lm_eval's may hold it already


def tokenizer_fingerprint(tokenizer):
    """Vocabulary, special tokens, template, and how a probe text is cut (merges and normalisation show there)."""
    probe = encode(tokenizer, "A probe: 1234 + 5 = 1,239\n\n  caf\u00e9 \u6f22\u5b57 <x>\t'quoted'")
    return fingerprint(sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens), probe,
                       tokenizer.get_chat_template() if tokenizer.chat_template else None)


def weight_files(folder):
    """{file name: path} of the folder's safetensors, from the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where = read_json(index, "downloading the model again").get("weight_map")
        names = sorted({str(name) for name in where.values()}) if isinstance(where, dict) else []
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise InputError(f"{folder}: holds no *.safetensors weights (of pytorch_model*.bin, pickles, which may hold code: if you trust "
                         f"them, python convert.py {folder} OUT --allow_pickle; from the hub: hf download NAME --local-dir DIR)")
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
        adapter = lora.read(model)
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


def load_model(name, dtype, ds_config=None, trust_remote_code=False, shift_logits="auto", load_in_4bit=False):
    """The model in training mode with dropout 0, weights loaded strictly, an adapter beside them; partitioned as `ds_config` says.

    dtype: torch dtype of every parameter. ds_config: the resolved DeepSpeed configuration, or None for a plain model.
    shift_logits: yes, no or auto (families.shifted). load_in_4bit: the blocks in NF4 (quantized.py).
    Raises InputError naming the tensor that is unknown, missing or of another shape.
    """
    folder, config = base_folder(name), load_config(name, trust_remote_code)
    if trust_remote_code and getattr(config, "auto_map", None) and config.model_type not in families.KNOWN:
        print(f"warning: {folder} brings its own code, and --trust_remote_code lets it do whatever you may do on this machine",
              file=sys.stderr, flush=True)
    for field in [key for key in config.to_dict() if "dropout" in key or key in ("attn_pdrop", "resid_pdrop", "embd_pdrop")]:
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
        model = families.build(config, dtype, shift, trust_remote_code)
    if load_in_4bit:
        quantized.prepare(model, dtype)
    fill(model, folder)
    if (adapter := model_folder(name)) != folder:
        if lora.base_of(adapter).get("fingerprint", "") not in ("", model_fingerprint(str(folder))):
            raise InputError(f"{name}: an adapter to {folder} as it was; the weights there are others now")
        if (packed := lora.base_of(adapter).get("load_in_4bit", load_in_4bit)) != load_in_4bit:
            print(f"warning: {name} was trained on its base {'in 4 bits' if packed else 'in whole weights'}; this is a slightly other "
                  f"model (--load_in_4bit {str(packed).lower()})", file=sys.stderr, flush=True)
        model = lora.attach(model, adapter, writing)  # beside, not added: bfloat16 would round most of it away
    return model.train()


@torch.no_grad()
def fill(model, folder):
    """Copy every tensor of the folder's safetensors into the model, one at a time."""
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())  # tied: by every name
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
    if missing := sorted(name for name, value in parameters.items() if id(value) not in have and isinstance(value, torch.nn.Parameter)):
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
        kept = {key: value for key, value in original.items() if key not in ("transformers_version", "torch_dtype", "dtype")}
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
            if path.is_file() and path.resolve().suffix in ("", ".py"):  # no link to something else; "": a file of the hub's cache
                shutil.copyfile(path, work / path.name)
        return auto_map
    named = lambda value: f"{source}--{value}" if isinstance(value, str) and "--" not in value else value  # noqa: E731
    return {name: [*map(named, value)] if isinstance(value, list) else named(value) for name, value in auto_map.items()}
