"""A fresh tiny model of any family: a sentencepiece tokenizer trained on a preference file, and random weights.

    python examples/new_tiny.py --in prefs.jsonl --out runs/tiny-init
    python examples/new_tiny.py --in examples/prefs.jsonl --out runs/tiny-sdar --family sdar

Output: config.json, model.safetensors, tokenizer.model, tokenizer_config.json. Digits are split and bytes fall back, so
that numbers are read digit by digit and any text encodes; sentencepiece adds and removes no space. A family other than
llada gets the fields and tensor names of its makers' checkpoints, its mask token, and where its rules are known a chat
template that follows them, in our words.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import jsonlines
import sentencepiece
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from files import by_umask
from models import architecture, experts, families
from models.llada import LLaDAConfig, LLaDAModelLM

UNK, BOS, EOS, MASK = 0, 1, 2, 3

# --- chat templates ---

# Qwen3's rules, which SDAR's template has too: a <think> block in the last answer, no thoughts in earlier ones
THINK_TEMPLATE = (
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set parts = m.content.split('</think>') %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% if loop.last and loop.index0 > ns.asked %}{{ '<think>\n' }}"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}{{ '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# LLaDA2's rules: roles in upper case, a system turn that always ends with "detailed thinking off"
ROLE_TEMPLATE = (
    "{% set system = messages[0].content + '\n' if messages[0].role == 'system' else '' %}"
    "{{ '<role>SYSTEM</role>' + system + 'detailed thinking off<|role_end|>' }}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<role>' + {'user': 'HUMAN', 'assistant': 'ASSISTANT'}[m.role] + '</role>' + m.content + '<|role_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)
TURNS = ["<|im_start|>", "<|im_end|>"]
ROLES = ["<role>", "</role>", "<|role_end|>"]
TEMPLATES = {  # family: (its chat template, the special tokens of it)
    "sdar": (THINK_TEMPLATE, TURNS),
    "a2d-qwen3": (THINK_TEMPLATE, TURNS),
    "lladamoe": (ROLE_TEMPLATE, ROLES),
    "llada2_moe": (ROLE_TEMPLATE, ROLES),
}

# --- config.json of each family: the fields that its makers' has, at a tiny size ---

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
QWEN3 = COMMON | {"head_dim": 16, "attention_bias": False, "sliding_window": None, "use_sliding_window": False}
MOE = COMMON | {"num_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
FIELDS = {
    "illada": COMMON
    | {
        "architectures": ["ILLaDAForCausalLM"],
        "model_type": "illada",
        "attention_bias": False,
        "layer_norm_eps": None,
        "mlp_bias": False,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "sdar": QWEN3
    | {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "block_size": 4, "mask_token_id": MASK},
    "a2d-qwen3": QWEN3
    | {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3", "tie_word_embeddings": True},
    "Fast_dLLM_Qwen": COMMON
    | {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "bd_size": 8},
    "nemotron_labs_diffusion": {name: value for name, value in COMMON.items() if not name.startswith("rope")}
    | {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "block_size": 8,
        "dlm_paradigm": "bidirectional",
        "head_dim": 16,
        "mask_token_id": MASK,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "sliding_window": None,
    },
    "lladamoe": MOE
    | {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",  # as published
        "num_key_value_heads": 4,
        "expert_intermediate_size": 24,
        "moe_layer_freq": [1, 1],
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rope_theta": 50000.0,
        "shared_expert_intermediate_size": None,
    },
    "llada2_moe": MOE
    | {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "num_shared_experts": 1,
        "partial_rotary_factor": 0.5,
        "rope_theta": 600000.0,
        "routed_scaling_factor": 2.5,
        "topk_group": 2,
    },
}


def train_tokenizer(texts, vocab_size, special=("<mask>",)):
    """The serialized sentencepiece model; ids 0..3 are <unk>, <s>, </s> and the mask, the first of `special`."""
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
        control_symbols=list(special),
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder, texts, vocab_size, family):
    """tokenizer.model and tokenizer_config.json of a family."""
    template, special = TEMPLATES.get(family, (None, []))
    mask = families.MASK_TOKENS.get(family, "<mask>")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, vocab_size, [mask, *special]))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "mask_token": mask,
        "clean_up_tokenization_spaces": False,
    }
    if family in families.MASK_TOKENS:
        del settings["mask_token"]  # its makers' tokenizer declares none: it is found by its name
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_llada(folder, vocab_size):
    """config.json and model.safetensors of a LLaDA of a million parameters; returns their number."""
    config = LLaDAConfig(
        d_model=128,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        mlp_hidden_size=384,
        vocab_size=vocab_size,
        embedding_size=vocab_size,
        max_sequence_length=512,
        rope_theta=10000.0,
        init_std=0.08,
        mask_token_id=MASK,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = LLaDAModelLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()


def write_model(folder, vocab_size, family):
    """config.json and model.safetensors as the family's makers publish them; returns the number of parameters."""
    (folder / "config.json").write_text(json.dumps(FIELDS[family] | {"vocab_size": vocab_size}, indent=2) + "\n")
    config = architecture.load_config(str(folder))
    if family.startswith("a2d"):
        config.block_size = 0  # its config.json does not say it, and the weights do not depend on it
    model = architecture.build(config, torch.float32, families.settle(config))
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = experts.split(model, model.state_dict())
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    by_umask(folder / "model.safetensors")
    return model.num_parameters()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in", dest="source", required=True, help="rows of prompt and chosen, or prompt and response")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new model")
    parser.add_argument("--family", choices=["llada", *FIELDS], default="llada")
    parser.add_argument("--vocab_size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with jsonlines.open(args.source) as rows:
        texts = [row[name] for row in rows for name in ("prompt", "chosen", "response") if name in row]
    lines = [line for text in texts for line in text.split("\n")]
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.out, lines, args.vocab_size, args.family)
    torch.manual_seed(args.seed)
    if args.family == "llada":
        count = write_llada(args.out, args.vocab_size)
    else:
        count = write_model(args.out, args.vocab_size, args.family)
    print(f"{args.out}: {count:,} parameters, vocabulary {args.vocab_size}")


if __name__ == "__main__":
    main()
