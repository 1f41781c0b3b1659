"""Low-rank adapters (Hu et al., arXiv 2106.09685) on the linear layers of the blocks, by peft; the base stays as it is.

    train_dpo.py --lora_r 16 -> runs/NAME/final (adapter_config.json, adapter_model.safetensors: peft's format)
    generate.py --model runs/NAME/final          (its base, and the adapter beside it)
    python merge.py runs/NAME/final OUT

W' = W + alpha / r * B A, A (r, in) random, B (out, r) zero at first: the policy starts as the reference, which is the base.
No dropout: policy and reference would never agree, and a gradient added up segment by segment would not be the loss's.
"""

import contextlib
import json
import re
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from files import InputError, replacing_folder
from models import architecture, quantized
from models.folders import ADAPTER_BASE, read_adapter
from models.tensors import open_tensors

PREFIX = "base_model.model."  # of a tensor's name in peft's files


def pattern(model, targets="auto"):
    """(regular expression, names) of the block's linear layers that `targets` names: auto, all of them; or leaves such as
    q_proj,v_proj, each of which must match."""
    linears = architecture.block_linears(model)
    parts = {
        name: re.match(r"(.*?)\.\d+\.(.+)", name).groups() for name in linears
    }  # (path of the blocks, path inside)
    if targets != "auto":
        chosen = {}
        for target in filter(None, (word.strip() for word in targets.split(","))):
            found = {name: part for name, part in parts.items() if f".{part[1]}".endswith(f".{target}")}
            if not found:
                known = ",".join(sorted({inside.rpartition(".")[2] for _, inside in parts.values()}))
                raise InputError(
                    f"--lora_targets {target}: matches no linear layer of the blocks; there are {known} (auto: all)"
                )
            chosen |= found
        parts = chosen
    if not parts:
        raise InputError("--lora_targets: the model's blocks hold no linear layer that it matches")
    groups = {}
    for before, inside in parts.values():
        groups.setdefault(before, set()).add(re.sub(r"\b\d+\b", "#", inside))
    text = "|".join(
        rf"{re.escape(before)}\.\d+\.({'|'.join(re.escape(each) for each in sorted(inside))})"
        for before, inside in sorted(groups.items())
    ).replace(r"\#", r"\d+")
    assert {name for name in linears if re.fullmatch(text, name)} == set(parts), text
    return text, sorted(parts)


def add(model, r, alpha, targets, seed, source):
    """The model with adapters, which alone require a gradient, and a line that says so. Peft's names them `default`."""
    import peft

    if r < 1 or not 0 < alpha < float("inf"):
        raise InputError(f"--lora_r is {r} and --lora_alpha {alpha}; expected at least 1, and more than 0")
    text, names = pattern(model, targets)
    base = sum(map(quantized.numel, model.parameters()))
    torch.manual_seed(seed)  # of A
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's reading of a name that transformers renames
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=r,
                lora_alpha=alpha,
                lora_dropout=0.0,
                target_modules=text,
                bias="none",
                base_model_name_or_path=str(source),
            ),
            autocast_adapter_dtype=False,
        )
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(names), f"{len(trained)} tensors to train for {len(names)} layers"
    count = sum(parameter.numel() for parameter in trained)
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    return wrapped, (
        f"LoRA: r {r}, alpha {alpha:g}, {len(names)} layers ({leaves}), {count:,} of {base + count:,} parameters "
        f"to train ({100 * count / (base + count):.2f}%); every dropout is 0"
    )


def save(folder, model, tensors, tokenizer, card, base):
    """Write an adapter's folder in peft's format: all of it, or nothing. tensors: {name in the model: whole CPU tensor}.

    base: what is to be known of the base model to load it again as it was (BASE)."""
    adapter = model.peft_config["default"]
    adapter.inference_mode = True
    with replacing_folder(folder) as work:
        work.mkdir(parents=True)
        adapter.save_pretrained(work)
        save_file(
            {name.replace(".default.", "."): tensor.contiguous() for name, tensor in tensors.items()},
            work / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        tokenizer.save_pretrained(work)
        (work / ADAPTER_BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
        (work / "README.md").write_text(card, encoding="utf-8")


@contextlib.contextmanager
def opened(model, folder):
    """(adapter_config.json, {layer of the model: (A (r, in), B (out, r)), float32}, read when asked for) of an adapter that
    belongs to `model`."""
    config, path, linears = (
        read_adapter(folder),
        Path(folder) / "adapter_model.safetensors",
        architecture.block_linears(model),
    )
    if (
        config.get("peft_type") != "LORA"
        or any(
            config.get(key)
            for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
        )
        or config.get("bias") != "none"
    ):
        raise InputError(
            f"{folder}/adapter_config.json: expected plain LoRA (no DoRA, rsLoRA, patterns, biases or whole modules)"
        )
    with open_tensors(path) as file:
        names = set(file.keys())
        found = {
            name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            for name in names
            if name.endswith(".lora_A.weight")
        }
        wanted = {f"{PREFIX}{name}.lora_{side}.weight" for name in found for side in "AB"}
        if strange := sorted((names ^ wanted) | {name for name in found if name not in linears}):
            raise InputError(f"{path}: tensor {strange[0]} does not belong to an adapter of this model")
        for name in sorted(found):
            a, b = (file.get_slice(f"{PREFIX}{name}.lora_{side}.weight").get_shape() for side in "AB")
            if (b[0], a[1]) != linears[name][::-1]:
                raise InputError(
                    f"{path}: the adapter of {name} is for a layer of {[b[0], a[1]]}, not {list(linears[name][::-1])}"
                )
        yield (
            config,
            {
                name: lambda name=name: [file.get_tensor(f"{PREFIX}{name}.lora_{side}.weight").float() for side in "AB"]
                for name in sorted(found)
            },
        )


@torch.no_grad()
def merge(model, folder):
    """Add the adapter of `folder` to its base `model`, in place, in float32, rounded once to the weights' dtype.

    Returns the share of what it adds that the rounding left: 1 in float32. In bfloat16 a weight moves by no less than some 1/256 of
    itself, so that little may be left of an adapter that was trained shortly.
    """
    kept = whole = 0.0
    with opened(model, folder) as (config, layers):
        for name, pair in layers.items():
            a, b = pair()
            weight, delta = model.get_submodule(name).weight, config["lora_alpha"] / config["r"] * (b @ a)
            before = weight.to(torch.float32, copy=True)
            weight.copy_(before + delta)
            kept, whole = kept + float((delta * (weight.float() - before)).sum()), whole + float((delta * delta).sum())
    return kept / whole if whole else 1.0


@torch.no_grad()
def attach(model, folder, writing):
    """`model` with the adapter of `folder` beside it: what was trained, in any dtype.

    writing(parameter): checkpoint.writing, a context in which one rank may change it.
    """
    import peft

    with opened(model, folder) as (config, layers):
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config["r"],
                lora_alpha=config["lora_alpha"],
                lora_dropout=0.0,
                target_modules=list(layers),
                bias="none",
                base_model_name_or_path=config.get("base_model_name_or_path"),
            ),
            autocast_adapter_dtype=False,
        )
        for name, pair in layers.items():
            layer = wrapped.base_model.model.get_submodule(name)
            for matrix, value in zip((layer.lora_A["default"].weight, layer.lora_B["default"].weight), pair()):
                with writing(matrix) as mine:
                    if mine:
                        matrix.copy_(value)
    return wrapped
