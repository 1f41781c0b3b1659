"""The model card of what a run makes: metadata that the Hub reads, then what a person wants to know before using it.

    base's README.md + run's arguments + last evaluation -> README.md beside the weights

Upload everything with one command:  hf upload YOU/NAME runs/NAME/final
"""

import os
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

import losses
from models import folders

# The run's arguments that shape the result
SHOWN = """
    loss_type loss_weights beta desirable_weight undesirable_weight label_smoothing simpo_gamma cpo_alpha discopop_tau
    sft_weight sft_pad_to estimator diffusion_steps trajectories order block_length ld_alpha backprop_steps noise_sets
    noise_seed learning_rate lr_scheduler_type warmup_ratio weight_decay max_grad_norm use_mixed_precision lora_r
    lora_alpha lora_targets load_in_4bit seed
    """.split()
# Those that SFT does not use
OF_PAIRS = """
    loss_weights beta sft_weight estimator diffusion_steps trajectories order block_length ld_alpha backprop_steps
    noise_sets
    """.split()
AUTO = {"llada": "llada", "smdm": "smdm"}  # model_type -> the file in models/ that registers it with transformers


def card_of_base(source):
    """The metadata of the card that came with the model `source`, {} if there is none."""
    path = folders.model_folder(source) / "README.md"
    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):  # a broken card is its author's business
        return {}


def is_hub(name):
    """Whether a model or a data set has a name on the Hub, such as org/name."""
    if not name or os.path.exists(name) or name.count("/") != 1:
        return False
    return not name.startswith((".", "/", "~")) and not name.endswith((".jsonl", ".json", ".parquet"))


def short(name):
    """A name on the Hub as it is; of a path the last part, so that no folder of this machine is named."""
    return name if is_hub(name) else Path(name).name


def metadata(source, arguments, data_sources):
    """What the Hub reads, as a dictionary. If the base is a folder, its own card may say what it is on the Hub."""
    base_card, lora = card_of_base(source), bool(arguments["lora_r"])
    base = source if is_hub(source) else base_card.get("base_model")
    relation = "adapter" if lora else "finetune"
    tag = arguments["loss_type"] if arguments["loss_type"] in ("sft", "kto") else "dpo"
    found = {
        "library_name": "peft" if lora else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "base_model_relation": relation if base else None,
        **{name: base_card.get(name) for name in ("license", "license_name", "license_link", "language")},
        "datasets": [each for each in data_sources if is_hub(each)] or None,
        "tags": ["diffusion-language-model", tag],
    }
    return {name: value for name, value in found.items() if value}


def text(run_name, arguments, packed, counts, evaluation, model_type):
    """README.md of a run's final/.

    packed: the Packed that it trained on. counts: {what: number}. evaluation: the metrics of the last one, or {}.
    """
    source, data_sources = arguments["model_name_or_path"], list(packed.files)
    base, data = short(source), ", ".join(map(short, data_sources))
    front = metadata(source, arguments, data_sources)
    loss, is_sft = arguments["loss_type"], arguments["loss_type"] == "sft"
    rows = {"base": base, "data": f"{data} (fingerprint {packed.meta['fingerprint']})", **counts}
    rows |= {name: arguments[name] for name in SHOWN if is_used(name, arguments)}
    method = " plus ".join(losses.LOSSES[name].method for name in loss.split(","))
    lines = [f"# {run_name}", "", f"{base} after {method}, trained with train_dpo.py."]
    lines += ["", "## Training", "", *table(rows)]
    if evaluation:
        kind = "a loss" if is_sft else "preferences"
        note = f"These are figures of {kind}, not of tasks: measure what you need it for (evaluate.py)."
        lines += ["", "## On held-out pairs", "", *table(evaluation), "", note]
    lines += ["", "## Use", "", *usage(model_type, bool(arguments["lora_r"]), arguments["load_in_4bit"])]
    licence = f"That of its base: {front.get('license')}."
    if not front.get("license"):
        licence = f"That of its base, {base}, whose files came with no card that names it: add it before sharing this."
    lines += ["", "## Licence", "", licence]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n" + "\n".join(lines) + "\n"


def is_used(name, arguments):
    """Whether an argument of SHOWN shaped the result."""
    chosen, readers = arguments["loss_type"].split(","), losses.readers(name)
    if arguments[name] is None or (readers and not set(readers) & set(chosen)):
        return False
    return chosen != ["sft"] or name not in OF_PAIRS


def table(rows):
    """{name: value} as the lines of a table in Markdown."""
    return ["| | |", "|---|---|", *(f"| {name} | {shown(value)} |" for name, value in rows.items())]


def shown(value):
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):  # an interval
        return f"[{value[0]:.3f}, {value[1]:.3f}]"
    return str(value)


def usage(model_type, is_lora, in_4bit):
    """Lines that show how the model is used."""
    flag = " --load_in_4bit true" if in_4bit else ""
    lines = ["```bash", f"python generate.py --model_name_or_path THIS_FOLDER{flag} --prompt '...'", "```"]
    if model_type in AUTO and not is_lora:
        name = AUTO[model_type]
        lines += [
            "",
            f"Or with transformers, where models/{name}.py of the same code can be imported:",
            "",
            "```python",
            f"from models import {name}  # registers the architecture; no remote code",
            "from transformers import AutoModelForMaskedLM",
            'model = AutoModelForMaskedLM.from_pretrained("THIS_FOLDER")',
            "```",
        ]
    return lines
