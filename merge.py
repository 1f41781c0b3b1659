"""A LoRA adapter merged into its base model: one Hugging Face folder of whole weights.

    adapter folder (its base named in it) -> OUT: config.json, safetensors, tokenizer, model card
    python data_prep.py --in examples/prefs.jsonl
    python score.py --data packed --use_mixed_precision no
    python train_dpo.py --data packed --use_mixed_precision no --lora_r 8 --max_steps 5 --output_dir runs/lora
    python merge.py runs/lora/final runs/merged --use_mixed_precision no

bfloat16 rounds small changes away, so how much is left of what the adapter adds is measured and said.
"""

import sys

from cli import exits
from cli.parser import Parser
from files import InputError, check_new


def read_arguments(argv=None):
    """Namespace: adapter, out, use_mixed_precision."""
    parser = Parser([], __doc__)
    parser.add_argument("adapter", help="folder of the adapter, such as runs/NAME/final")
    parser.add_argument("out", help="folder to write, which must not exist yet")
    parser.add_argument(
        "--use_mixed_precision", choices=("bf16", "no"), default="bf16", help="bf16: bfloat16 weights; no: float32"
    )
    args = parser.parse_args(argv)
    check_new(args.out)
    return args


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

from models import families, folders, lora
from models.architecture import load_config
from models.checkpoint import DTYPES, load_model, save_model
from models.folders import model_folder
from models.tokenization import load_tokenizer


def merge(adapter, out, dtype):
    """Write `out`, the merged model, its weights as `dtype` says (a key of DTYPES).

    Returns the base that it was merged into, and the share of what the adapter adds that rounding left. Raises InputError if
    `adapter` holds no adapter.
    """
    folder = model_folder(adapter)
    if not folders.read_adapter(folder):
        raise InputError(f"{adapter}: holds no adapter_config.json; expected the folder of an adapter")
    source, noted = folders.read_adapter(folder)["base_model_name_or_path"], folders.adapter_base(folder)
    shift = "yes" if families.shifted(load_config(adapter)) else "no"
    model = load_model(source, DTYPES[dtype], shift_logits=shift)
    kept = lora.merge(model, folder)
    card = (
        (folder / "README.md").read_text(encoding="utf-8")
        if (folder / "README.md").is_file()
        else "---\nlibrary_name: peft\n---\n"
    )
    card = card.replace("library_name: peft", "library_name: transformers", 1).replace(
        "_relation: adapter", "_relation: finetune", 1
    )
    card += f"\nThis is the adapter merged into its base: of what it adds, {100 * kept:.1f}% is left after rounding.\n"
    save_model(
        out, model, dict(model.named_parameters()), source, load_tokenizer(adapter), card, noted.get("mask_token_id")
    )
    return source, kept


def main(argv=None):
    args = read_arguments(argv)
    source, kept = merge(args.adapter, args.out, args.use_mixed_precision)
    print(
        f"{args.out}: {args.adapter} merged into {source}; {100 * kept:.1f}% of what it adds is left after rounding to "
        f"{'bfloat16' if args.use_mixed_precision == 'bf16' else 'float32'}",
        flush=True,
    )
    if kept < 0.9:
        print(
            f"warning: {args.out} is hardly what was trained; sample from {args.adapter} itself, or merge with --use_mixed_precision no "
            "and load it so",
            file=sys.stderr,
            flush=True,
        )
    print(f"next: python generate.py --model_name_or_path {args.out} --prompt '...'", flush=True)
    return 0


if __name__ == "__main__":
    exits.run(main)
