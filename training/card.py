"""The model card of what a run makes: metadata that the hub reads, then what a person wants to know before using the model.

    base's README.md + run's arguments + last evaluation -> README.md beside the weights

Upload it all with one line:  hf upload YOU/NAME runs/NAME/final
"""

import os
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from models import folders

METHODS = {
    "sigmoid": "Direct Preference Optimization (arXiv 2305.18290)",
    "ipo": "IPO (arXiv 2310.12036)",
    "hinge": "a hinge loss on the preference margin (SLiC, arXiv 2305.10425)",
    "sft": "supervised fine-tuning by the masked-diffusion loss (arXiv 2502.09992)",
}
# of the run's arguments, what shapes the result
SHOWN = (
    "loss_type",
    "beta",
    "label_smoothing",
    "sft_weight",
    "sft_pad_to",
    "estimator",
    "diffusion_steps",
    "trajectories",
    "order",
    "block_length",
    "backprop_steps",
    "noise_sets",
    "noise_seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "use_mixed_precision",
    "lora_r",
    "lora_alpha",
    "lora_targets",
    "load_in_4bit",
    "seed",
)
PAIRS = (
    "beta",
    "label_smoothing",
    "sft_weight",
    "estimator",
    "diffusion_steps",
    "trajectories",
    "order",
    "block_length",
    "backprop_steps",
    "noise_sets",
)  # what SFT has no use for
AUTO = {"llada": "llada", "smdm": "smdm"}  # model_type -> the file of ours that registers it with transformers


def said_of_base(source):
    """The metadata of the card that came with the model `source`, {} where there is none."""
    path = folders.model_folder(source) / "README.md"
    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):  # its card is not ours to mend
        return {}


def is_hub(name):
    return (
        bool(name)
        and not os.path.exists(name)
        and name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and not name.endswith((".jsonl", ".json", ".parquet"))
    )


def metadata(source, arguments, data_source):
    """What the hub reads, as a dictionary. A base that is a folder has no name there: then what its own card calls its base."""
    said, lora = said_of_base(source), bool(arguments["lora_r"])
    base = source if is_hub(source) else said.get("base_model")
    found = {
        "library_name": "peft" if lora else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "base_model_relation": ("adapter" if lora else "finetune") if base else None,
        **{name: said.get(name) for name in ("license", "license_name", "license_link", "language")},
        "datasets": [data_source] if is_hub(data_source) else None,
        "tags": ["diffusion-language-model", "sft" if arguments["loss_type"] == "sft" else "dpo"],
    }
    return {name: value for name, value in found.items() if value}


def text(run_name, arguments, packed, counts, evaluation, model_type):
    """README.md of a run's final/. packed: the packed.Packed it trained on; counts: {what: number}; evaluation: the last one's metrics."""
    source, data_source = arguments["model_name_or_path"], packed.meta["source"]
    front, sft = metadata(source, arguments, data_source), arguments["loss_type"] == "sft"
    base, data = (name if is_hub(name) else Path(name).name for name in (source, data_source))
    licence = front.get("license")
    rows = [("base", base), ("data", f"{data} (fingerprint {packed.meta['fingerprint']})"), *counts.items()]
    rows += [(name, arguments[name]) for name in SHOWN if not (sft and name in PAIRS)]
    lines = [
        f"# {run_name}",
        "",
        f"{base} after {METHODS[arguments['loss_type']]}, trained with train_dpo.py.",
        "",
        "## Training",
        "",
        *table(rows),
    ]
    if evaluation:
        lines += [
            "",
            "## On held-out pairs",
            "",
            *table(evaluation.items()),
            "",
            f"These are figures of {'a loss' if sft else 'preferences'}, not of tasks: measure what you need it for (evaluate.py).",
        ]
    lines += ["", "## Use", "", *usage(model_type, bool(arguments["lora_r"]), arguments["load_in_4bit"])]
    lines += [
        "",
        "## Licence",
        "",
        f"That of its base: {licence}."
        if licence
        else f"That of its base, {base}, whose files came with no card that names it: say it here before this is shared.",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n" + "\n".join(lines) + "\n"


def table(rows):
    show = lambda value: (
        f"{value:.4g}"
        if isinstance(value, float)
        # noqa: E731
        else (f"[{value[0]:.3f}, {value[1]:.3f}]" if isinstance(value, (list, tuple)) else str(value))
    )
    return ["| | |", "|---|---|", *(f"| {name} | {show(value)} |" for name, value in rows)]


def usage(model_type, lora, packed_4bit):
    flag = " --load_in_4bit true" if packed_4bit else ""
    lines = ["```bash", f"python generate.py --model_name_or_path THIS_FOLDER{flag} --prompt '...'", "```"]
    if model_type in AUTO and not lora:
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
