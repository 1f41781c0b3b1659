"""A fresh tiny LLaDA: a sentencepiece tokenizer trained on a preference file, and random weights.

    python examples/new_tiny.py --in prefs.jsonl --out runs/tiny-init

Output: config.json, model.safetensors, tokenizer.model, tokenizer_config.json. Digits are split and bytes fall back, so
that numbers are read digit by digit and any text encodes; sentencepiece adds and removes no space.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import jsonlines
import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from models.llada import LLaDAConfig, LLaDAModelLM

UNK, BOS, EOS, MASK = 0, 1, 2, 3


def train_tokenizer(texts, vocab_size):
    """The serialized sentencepiece model; ids 0..3 are <unk>, <s>, </s>, <mask>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        control_symbols=["<mask>"],
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in", dest="source", required=True, help="preference rows: prompt, chosen, rejected")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new model")
    parser.add_argument("--vocab_size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with jsonlines.open(args.source) as rows:
        lines = [line for row in rows for text in (row["prompt"], row["chosen"]) for line in text.split("\n")]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tokenizer.model").write_bytes(train_tokenizer(lines, args.vocab_size))
    (args.out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": False,
                "add_eos_token": False,
                "add_prefix_space": False,
                "legacy": False,
                "unk_token": "<unk>",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "</s>",
                "mask_token": "<mask>",
                "clean_up_tokenization_spaces": False,
            },
            indent=2,
        )
        + "\n"
    )
    torch.manual_seed(args.seed)
    config = LLaDAConfig(
        d_model=128,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        mlp_hidden_size=384,
        vocab_size=args.vocab_size,
        embedding_size=args.vocab_size,
        max_sequence_length=512,
        rope_theta=10000.0,
        init_std=0.08,
        mask_token_id=MASK,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = LLaDAModelLM(config)
    model.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, vocabulary {args.vocab_size}")


if __name__ == "__main__":
    main()
