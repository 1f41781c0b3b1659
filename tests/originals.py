"""What the tests of models/ share: small checkpoints as their makers publish them, independent logits."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import save_file
from small import MASK, VOCAB

from files import InputError
from models import families

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
ORIGINALS = {  # family: (class that makes it, its configuration, fields of the original's config.json beside)
    "Dream": (
        "Qwen2ForCausalLM",
        GROUPED,
        {
            "model_type": "Dream",
            "architectures": ["DreamModel"],
            "rope_theta": 1e6,
            "mask_token_id": MASK,
            "pad_token_id": 2,
            "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
    ),
    "a2d-qwen3": (
        "Qwen3ForCausalLM",
        GROUPED | {"head_dim": 16},
        {
            "model_type": "a2d-qwen3",
            "architectures": ["A2DQwen3LMHeadModel"],
            "block_size": 0,
            "tie_word_embeddings": True,
            "rope_theta": 1e4,
        },
    ),
    "a2d-llama": (
        "LlamaForCausalLM",
        GROUPED,
        {
            "model_type": "a2d-llama",
            "architectures": ["A2DLlamaLMHeadModel"],
            "block_size": 0,
            "tie_word_embeddings": False,
            "rope_theta": 1e4,
        },
    ),
    "bert": (
        "BertForPreTraining",
        SMALL | {"max_position_embeddings": 512},
        {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        SMALL
        | {
            "num_hidden_layers": 4,
            "local_attention": 8,
            "pad_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "max_position_embeddings": 512,
        },
        {"mlp_dropout": 0.1},
    ),
    "albert": ("AlbertForPreTraining", SMALL | {"embedding_size": 16, "max_position_embeddings": 512}, {}),
}
SMDM_WIDTH, SMDM_HEADS = 32, 4


def make_smdm(path):
    """A small checkpoint with SMDM's names and shapes: {name: tensor}, written to path."""
    D, hidden, draw = SMDM_WIDTH, 48, torch.Generator().manual_seed(1)
    shapes = {"transformer.wte.weight": (VOCAB, D), "lm_head.weight": (VOCAB - 1, D), "transformer.ln_f.weight": (D,)}
    for i in range(2):
        block = f"transformer.h.{i}"
        shapes |= {
            f"{block}.norm_1.weight": (D,),
            f"{block}.norm_2.weight": (D,),
            f"{block}.attn.attn.weight": (3 * D, D),
            f"{block}.attn.proj.weight": (D, D),
            f"{block}.mlp.swiglu.w1.weight": (hidden, D),
            f"{block}.mlp.swiglu.w2.weight": (hidden, D),
            f"{block}.mlp.swiglu.w3.weight": (D, hidden),
        }
    tensors = {
        name: torch.randn(shape, generator=draw) * (1.0 if len(shape) == 1 else 2 / shape[-1] ** 0.5)
        for name, shape in shapes.items()
    }
    save_file(tensors, path)
    return tensors


def smdm_logits(tensors, ids):
    """SMDM on ids (B, L) in plain torch: packed q, k, v per head, half-split rotation from bfloat16 tables."""

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * tensors[f"{name}.weight"]

    def turn(h):
        a, b = h[..., : hd // 2], h[..., hd // 2 :]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    x, hd = tensors["transformer.wte.weight"][ids], SMDM_WIDTH // SMDM_HEADS
    angle = torch.arange(ids.shape[1])[:, None] / 10000.0 ** (torch.arange(0, hd, 2) / hd)
    cos, sin = (part.bfloat16().float()[None, :, None] for part in (angle.cos(), angle.sin()))  # (1, L, 1, hd/2)
    for block in ("transformer.h.0", "transformer.h.1"):
        packed = linear(norm(x, f"{block}.norm_1"), f"{block}.attn.attn").view(*ids.shape, SMDM_HEADS, 3, hd)
        q, k, v = turn(packed[..., 0, :]), turn(packed[..., 1, :]), packed[..., 2, :]  # (B, L, H, hd)
        weight = (torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(hd)).softmax(-1)
        mixed = torch.einsum("bhlm,bmhd->blhd", weight, v).reshape(*ids.shape, -1)
        x = x + linear(mixed, f"{block}.attn.proj")
        h, mlp = norm(x, f"{block}.norm_2"), f"{block}.mlp.swiglu"
        gate = linear(h, f"{mlp}.w1")
        x = x + linear(gate * gate.sigmoid() * linear(h, f"{mlp}.w2"), f"{mlp}.w3")
    return linear(norm(x, "transformer.ln_f"), "lm_head")


def make_original(folder, family):
    """A random checkpoint of `family` as its makers publish it; returns the model that made it."""
    name, fields, said = ORIGINALS[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    shape = {key: value for key, value in said.items() if key in ("rope_theta", "tie_word_embeddings")}
    model = cls(cls.config_class(**fields, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases at 1 and 0 would prove nothing
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tensors, seen = {}, set()
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied weight is stored once
            seen.add(tensor.data_ptr())
            if family == "bert":
                key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[key] = tensor.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = cls.config_class.model_type
    (folder / "config.json").write_text(json.dumps({"model_type": base, **fields, **said}))
    return model


def oracle(model, ids, family):
    """(B, L, V) logits of each token's own position."""
    with torch.no_grad():
        if family not in families.CAUSAL:
            out = model(input_ids=ids)
            return out.logits if "logits" in out else out.prediction_logits
        logits = model(input_ids=ids, attention_mask=torch.zeros(ids.shape[0], 1, ids.shape[1], ids.shape[1])).logits
    return torch.cat((logits[:, :1], logits[:, :-1]), 1) if family == "Dream" else logits


def refused(call, *words):
    """call() raises an InputError of one line that holds all `words`."""
    with pytest.raises(InputError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def edit_json(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
