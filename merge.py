"""Merge a LoRA adapter into its base model: one Hugging Face folder that needs no adapter.

    adapter folder (its base named in it) -> OUT: config.json, safetensors, tokenizer, model card
    python data_prep.py --in examples/prefs.jsonl
    python score.py --data packed --use_mixed_precision no
    python train_dpo.py --data packed --use_mixed_precision no --lora_r 8 --max_steps 5 --output_dir runs/lora
    python merge.py runs/lora/final runs/merged --use_mixed_precision no

bfloat16 rounds small changes away. The command measures and prints the share of what the adapter adds that is left.
"""

import shlex
import sys

import config
from cli import exits
from cli.parser import Parser
from files import InputError, check_new


def read_arguments(argv=None):
    """Namespace: adapter, out, base_model, use_mixed_precision."""
    parser = Parser([config.AdapterArguments], __doc__)
    parser.add_argument("adapter", help="folder of the adapter, such as runs/NAME/final")
    parser.add_argument("out", help="folder to write, which must not exist yet")
    parser.add_argument(
        "--use_mixed_precision", choices=("bf16", "no"), default="bf16", help="bf16: bfloat16 weights; no: float32"
    )
    args = parser.parse_args(argv)
    config.adapters.base_model = args.base_model
    check_new(args.out)
    return args


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import torch

from models import families, folders, lora
from models.checkpoint import DTYPES, load_model, save_model
from models.folders import model_folder
from models.tokenization import load_tokenizer
from training.runs import STREAMING


def merge(adapter, out, dtype):
    """Write `out`, the merged model, its weights as `dtype` says (a key of DTYPES).

    Returns (folder or Hub name of the base, share of what the adapter adds that is left after rounding). Raises
    InputError if `adapter` is no adapter.
    """
    folder = model_folder(adapter)
    if folders.read_adapter(folder) is None:
        raise InputError(f"{adapter}: holds no adapter_config.json; expected the folder of an adapter")
    (base, _), noted = folders.base_of(folder), folders.adapter_base(folder)
    as_trained = folders.plain_config(adapter)
    shift, block_size = "yes" if families.shifted(as_trained) else "no", families.block_size(as_trained)
    model = load_model(base, DTYPES[dtype], shift_logits=shift, block_size=block_size)
    kept = lora.merge(model, folder)
    tokenizer, weights = load_tokenizer(adapter), dict(model.named_parameters())
    save_model(out, model, weights, base, tokenizer, merged_card(folder, kept), noted.get("mask_token_id"))
    return base, kept


def merged_card(folder, kept):
    """The merged model's card: the adapter's, with the tags of a whole model and the share that rounding left."""
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n"
    card = card.replace("library_name: peft", "library_name: transformers", 1)
    card = card.replace("_relation: adapter", "_relation: finetune", 1)
    return card + f"\nThis is the adapter merged into its base: of what it adds, {kept:.1%} is left after rounding.\n"


def fits_card(folder):
    """Whether the card, if there is one, holds the weights of `folder` and a fifth of its memory more."""
    if not torch.cuda.is_available():
        return True
    weights = sum(path.stat().st_size for path in folders.weight_files(model_folder(folder)).values())
    return weights < 0.8 * torch.cuda.get_device_properties(0).total_memory


def main(argv=None):
    args = read_arguments(argv)
    base, kept = merge(args.adapter, args.out, args.use_mixed_precision)
    dtype = "bfloat16" if args.use_mixed_precision == "bf16" else "float32"
    print(
        f"{args.out}: {args.adapter} merged into {base}; {kept:.1%} of what it adds is left after rounding to {dtype}",
        flush=True,
    )
    if kept < 0.9:
        print(
            f"warning: {args.out} is not the model that was trained: rounding removed much of it; use {args.adapter} "
            "itself, or merge and load with --use_mixed_precision no",
            file=sys.stderr,
            flush=True,
        )
    model, base = shlex.quote(args.out), shlex.quote(base)
    flags = "" if args.use_mixed_precision == "bf16" else " --use_mixed_precision no"
    if not fits_card(args.out):
        flags += f" --deepspeed {STREAMING}"
    print(f"next: python evaluate.py --model {model} --compare {base} --tasks gsm8k{flags}", flush=True)
    return 0


if __name__ == "__main__":
    exits.run(main)
