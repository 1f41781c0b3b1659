"""Low-rank adapters (Hu et al., arXiv 2106.09685) on the blocks' linear layers; the base stays unchanged.

    train_dpo.py --lora_r 16 -> runs/NAME/final (adapter_config.json, adapter_model.safetensors: peft's format)
    generate.py --model runs/NAME/final          (the base, with the adapter beside it)
    python merge.py runs/NAME/final OUT

W' = W + alpha / r * B A, A (r, in) random, B (out, r) zero at first: the policy starts as the reference, which is the
base. Dropout is 0: otherwise policy and reference would never agree, and a gradient that is added up segment by segment
would not be the loss's.

A layer with its adapter is one module, so ZeRO-3 gathers its weight, A and B together; peft's wrappers are several. The
files are in peft's format, and peft loads them.
"""

import contextlib
import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from files import InputError, replacing_folder
from models import architecture, quantized
from models.folders import ADAPTER_BASE, read_adapter
from models.tensors import open_tensors

PREFIX = "base_model.model."  # of a tensor's name in peft's files
VARIANTS = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


def pattern(model, targets="auto"):
    """(regular expression, sorted names) of the block's linear layers that `targets` names.

    targets: auto, all of them; or ends of names such as q_proj,v_proj, each of which must match a layer.
    """
    places = {}  # {name of a layer: (path of its blocks, path inside its block)}
    for name in architecture.block_linears(model):
        places[name] = re.match(r"(.*?)\.\d+\.(.+)", name).groups()
    chosen = places if targets == "auto" else named(places, targets)
    if not chosen:
        raise InputError("--lora_targets: the model's blocks hold no linear layer that it matches")
    insides = {}  # {path of blocks: patterns inside a block}
    for blocks, inside in chosen.values():
        escaped = re.escape(re.sub(r"\b\d+\b", "#", inside)).replace(r"\#", r"\d+")
        insides.setdefault(re.escape(blocks), set()).add(escaped)
    text = "|".join(rf"{blocks}\.\d+\.({'|'.join(sorted(each))})" for blocks, each in sorted(insides.items()))
    assert {name for name in places if re.fullmatch(text, name)} == chosen.keys(), text
    return text, sorted(chosen)


def named(places, targets):
    """The layers of `places` whose path inside the block ends with one of `targets`, separated by commas."""
    chosen = {}
    for target in filter(None, (word.strip() for word in targets.split(","))):
        found = {name: place for name, place in places.items() if f".{place[1]}".endswith(f".{target}")}
        if not found:
            known = ",".join(sorted({inside.rpartition(".")[2] for _, inside in places.values()}))
            raise InputError(
                f"--lora_targets {target}: matches no linear layer of the blocks; there are {known} (auto: all)"
            )
        chosen |= found
    return chosen


def add(model, r, alpha, targets, seed, source):
    """(`model` itself, now with adapters, which alone require a gradient; a line that describes them)."""
    if r < 1 or not 0 < alpha < float("inf"):
        raise InputError(f"--lora_r is {r} and --lora_alpha {alpha}; expected at least 1, and more than 0")
    text, names = pattern(model, targets)
    base_count = sum(map(quantized.numel, model.parameters()))
    torch.manual_seed(seed)  # of A
    wrap(model, names, r, alpha)
    model.adapter_config = peft_config(r, alpha, text, str(source))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(names), f"{len(trained)} tensors to train for {len(names)} layers"
    count = sum(parameter.numel() for parameter in trained)
    total = base_count + count
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    return model, (
        f"LoRA: r {r}, alpha {alpha:g}, {len(names)} layers ({leaves}), {count:,} of {total:,} parameters "
        f"to train ({100 * count / total:.2f}%); every dropout is 0"
    )


class Adapted:
    """What a linear layer does more when it has an adapter; the base computes as it does without one.

    x (..., in) -> W x + b + (x A' B') * alpha / r, (..., out).
    """

    def forward(self, x):
        result = super().forward(x)
        return result + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


@functools.cache
def adapted(kind):
    """The class of a `kind` of linear layer (nn.Linear, bitsandbytes' Linear4bit) with an adapter."""
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {})


def wrap(model, names, r, alpha):
    """Freeze `model` and give its layers `names` adapters, which require a gradient, in the dtype that they compute in.

    A is drawn as peft draws it, uniform within 1 / sqrt(in); B is 0.
    """
    model.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        a, b = torch.empty(r, layer.in_features), torch.zeros(layer.out_features, r)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        place = {"device": layer.weight.device, "dtype": getattr(layer, "compute_dtype", layer.weight.dtype)}
        layer.lora_A, layer.lora_B = nn.Parameter(a.to(**place)), nn.Parameter(b.to(**place))
        layer.scaling = alpha / r
        layer.__class__ = adapted(type(layer))


def peft_config(r, alpha, targets, source):
    """What peft's adapter_config.json says of a plain adapter; targets: a regular expression of the layers' names."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": source,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
        **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out"), False),
        "modules_to_save": None,
        **{name: {} for name in ("rank_pattern", "alpha_pattern")},
    }


def save(folder, model, tensors, tokenizer, card, base):
    """Write an adapter's folder in peft's format, complete or not at all.

    tensors: {name in the model: CPU tensor, not partitioned}. base: what is to be known of the base model to load it
    again in the same way (folders.adapter_base).
    """
    with replacing_folder(folder) as work:
        work.mkdir(parents=True)
        (work / "adapter_config.json").write_text(json.dumps(model.adapter_config, indent=2) + "\n", encoding="utf-8")
        saved = {f"{PREFIX}{name}.weight": tensor.contiguous() for name, tensor in tensors.items()}
        save_file(saved, work / "adapter_model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(work)
        (work / ADAPTER_BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
        (work / "README.md").write_text(card, encoding="utf-8")


@dataclass
class Adapter:
    """An adapter's open file. config: its adapter_config.json; names: the layers that it changes, sorted."""

    config: dict
    names: list
    file: object

    def pair(self, name):
        """A (r, in) and B (out, r) of a layer, float32."""
        return [self.file.get_tensor(f"{PREFIX}{name}.lora_{side}.weight").float() for side in "AB"]


@contextlib.contextmanager
def opened(model, folder):
    """The Adapter in `folder`. Raises InputError if it is not plain LoRA or does not fit `model`."""
    config, path = read_adapter(folder), Path(folder) / "adapter_model.safetensors"
    is_lora = config.get("peft_type") == "LORA" and config.get("bias") == "none"
    if not is_lora or any(config.get(variant) for variant in VARIANTS):
        raise InputError(
            f"{folder}/adapter_config.json: expected plain LoRA (no DoRA, rsLoRA, patterns, biases or modules_to_save)"
        )
    linears = architecture.block_linears(model)
    with open_tensors(path) as file:
        keys = set(file.keys())
        ends = ".lora_A.weight"
        names = {key.removeprefix(PREFIX).removesuffix(ends) for key in keys if key.endswith(ends)}
        expected = {f"{PREFIX}{name}.lora_{side}.weight" for name in names for side in "AB"}
        if strange := sorted((keys ^ expected) | (names - linears.keys())):
            raise InputError(f"{path}: tensor {strange[0]} does not belong to an adapter of this model")
        for name in sorted(names):
            a, b = (file.get_slice(f"{PREFIX}{name}.lora_{side}.weight").get_shape() for side in "AB")
            have, want = [b[0], a[1]], list(linears[name][::-1])
            if have != want:
                raise InputError(f"{path}: the adapter of {name} is for a layer of {have}, not {want}")
        yield Adapter(config, sorted(names), file)


@torch.no_grad()
def merge(model, folder):
    """Add the adapter of `folder` to its base `model`, in place, in float32, rounded once to the weights' dtype.

    Returns the share of what it adds that is left after rounding: 1 in float32. In bfloat16 a weight changes by about
    1/256 of itself at the least, so little may be left of an adapter that was trained for a short time.
    """
    kept = added = 0.0
    with opened(model, folder) as adapter:
        scale = adapter.config["lora_alpha"] / adapter.config["r"]
        for name in adapter.names:
            a, b = adapter.pair(name)
            weight, delta = model.get_submodule(name).weight, scale * (b @ a)  # (out, in)
            before = weight.to(torch.float32, copy=True)
            weight.copy_(before + delta)
            kept += float((delta * (weight.float() - before)).sum())
            added += float((delta * delta).sum())
    return kept / added if added else 1.0


@torch.no_grad()
def attach(model, folder, writing):
    """`model` with the adapter of `folder` beside it, not merged: what was trained, in any dtype.

    writing(parameter): checkpoint.writing, a context in which one rank may change it.
    """
    with opened(model, folder) as adapter:
        wrap(model, adapter.names, adapter.config["r"], adapter.config["lora_alpha"])
        for name in adapter.names:
            layer = model.get_submodule(name)
            for matrix, value in zip((layer.lora_A, layer.lora_B), adapter.pair(name)):
                with writing(matrix) as mine:
                    if mine:
                        matrix.copy_(value)
    return model
