"""LLaDA's architecture as a transformers model: bidirectional, original tensor names, no remote code.

config.json + *.safetensors (GSAI-ML/LLaDA-8B-*) -> logits.  Importing this file registers `model_type: llada`:

    from models import llada
    model = AutoModelForMaskedLM.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16)

Source: Nie et al., Large Language Diffusion Models, arXiv 2502.09992, and the checkpoints' configuration.
B batch, L length, D width, H heads, G key/value heads, hd head width, V vocabulary, N scored positions.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from models.head import Head


def check_supported(config, fields):
    """Refuse a field of config.json that has another value than in `fields`: {its name: the one that we support}."""
    for field, want in fields.items():
        got = getattr(config, field, want)
        if got != want and (got or want):  # None, False and 0 mean the same "off"
            raise ValueError(f"config.json: {field} is {got!r}; this LLaDA architecture supports {want!r} only")


class LLaDAConfig(PreTrainedConfig):
    """The fields of LLaDA's config.json that this architecture reads. It keeps the others and saves them back."""

    model_type = "llada"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }
    # What the original code can also build and no released LLaDA uses: refused, never silently ignored.
    SUPPORTED = {
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "rope": True,
        "alibi": False,
        "include_bias": False,
        "bias_for_layer_norm": False,
        "attention_layer_norm": False,
        "scale_logits": False,
        "input_emb_norm": False,
        "multi_query_attention": None,
        "block_group_size": 1,
        "clip_qkv": None,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "layer_norm_with_affine": True,
    }

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = None
    mlp_ratio: float = 4
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    include_qkv_bias: bool = False
    use_cache: bool = False
    init_std: float = 0.02
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_supported(self, self.SUPPORTED)
        if self.d_model % self.n_heads or self.n_heads % self.kv_heads:
            raise ValueError(
                f"config.json: n_heads {self.n_heads} must divide d_model {self.d_model}, and "
                f"n_kv_heads {self.kv_heads} must divide n_heads"
            )

    @property
    def kv_heads(self):
        return self.n_kv_heads or self.n_heads

    @property
    def mlp_width(self):
        return self.mlp_hidden_size or int(self.mlp_ratio * self.d_model)

    @property
    def rows(self):
        """Rows of embedding and head: embedding_size where given (it may exceed vocab_size; logits are not cut)."""
        return self.embedding_size or self.vocab_size

    @property
    def head_rows(self):
        return self.rows


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        h = x.float()  # the mean square in float32, cast back BEFORE the weight, as the original does
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rotary(length, width, theta, device):
    """cos, sin (L, hd) float32 of the half-split rotation (Su et al., arXiv 2104.09864)."""
    inverse = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse)  # (L, hd/2)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate x (B, H, L, hd) by position, in float32, cast back."""
    h = x.float()
    a, b = h.chunk(2, -1)
    return (h * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class LLaDABlock(GradientCheckpointingLayer):
    def __init__(self, config, layer):
        super().__init__()
        D, hd, self.layer = config.d_model, config.d_model // config.n_heads, layer
        self.heads, self.kv_heads, self.head_width = config.n_heads, config.kv_heads, hd
        self.attn_norm = RMSNorm(D, config.rms_norm_eps)
        self.q_proj = nn.Linear(D, D, bias=config.include_qkv_bias)
        self.k_proj = nn.Linear(D, config.kv_heads * hd, bias=config.include_qkv_bias)
        self.v_proj = nn.Linear(D, config.kv_heads * hd, bias=config.include_qkv_bias)
        self.attn_out = nn.Linear(D, D, bias=False)
        self.ff_norm = RMSNorm(D, config.rms_norm_eps)
        self.ff_proj = nn.Linear(D, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(D, config.mlp_width, bias=False)
        self.ff_out = nn.Linear(config.mlp_width, D, bias=False)

    def forward(self, x, cos, sin, bias, rows):
        B, L, D = x.shape
        h = self.attn_norm(x)
        q = rotate(self.q_proj(h).view(B, L, self.heads, self.head_width).transpose(1, 2), cos, sin)  # (B, H, L, hd)
        k = rotate(self.k_proj(h).view(B, L, self.kv_heads, self.head_width).transpose(1, 2), cos, sin)
        v = self.v_proj(h).view(B, L, self.kv_heads, self.head_width).transpose(1, 2)  # (B, G, L, hd)
        if rows is None:
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=self.heads != self.kv_heads)
        else:
            h = rows.attend(q, k, v, layer=self.layer)
        x = x + self.attn_out(h.transpose(1, 2).reshape(B, L, D))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAModel(nn.Module):
    """Embedding, blocks and final norm, held under the original names; the head belongs to LLaDAModelLM."""

    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.rows, config.d_model),
                "blocks": nn.ModuleList(LLaDABlock(config, layer) for layer in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
                "ff_out": Head(config.d_model, config.head_rows),
            }
        )


class LLaDAModelLM(PreTrainedModel):
    """Mask predictor: logits[i] predicts token i (no shift). Original config.json files name this class."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    joins_rows = True  # forward() takes rows of several lengths, end to end
    blocks = None  # it is bidirectional
    is_shifted = False  # the logits at i predict token i
    _no_split_modules = ["LLaDABlock"]
    _supports_sdpa = True
    _tied_weights_keys = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def _init_weights(self, module):
        """Normal(0, init_std), norms 1, biases 0; only training from scratch uses it."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, 0.0, self.config.init_std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def set_input_embeddings(self, embeddings):
        self.model.transformer.wte = embeddings

    def get_output_embeddings(self):
        return self.model.transformer.ff_out

    def set_output_embeddings(self, head):
        self.model.transformer.ff_out = head

    def rotary(self, length, device):
        return rotary(length, self.config.d_model // self.config.n_heads, self.config.rope_theta, device)

    def forward(self, input_ids, attention_mask=None, positions=None, targets=None, rows=None):
        """input_ids (B, L); attention_mask (B, L), 1 = real; positions (N,) flat indices b * L + i.

        rows: where the rows stand that are end to end in input_ids (1, L), each of which sees itself alone
        (attention.Rows, or cache.Windows of them).

        Returns MaskedLMOutput with logits (B, L, V), or (N, V) of `positions` alone. With `targets` (N,) too, returns
        their log-probabilities alone, (N,) float32: a score needs no more head than it reads (head.py).
        Positions are counted by index: padding on the left shifts them.
        """
        x = self.model.transformer.wte(input_ids)  # (B, L, D)
        cos, sin = self.rotary(rows.longest if rows else input_ids.shape[1], x.device)  # (longest, hd)
        bias = None
        if rows:
            cos, sin = cos[rows.places], sin[rows.places]  # (L, hd)
        if attention_mask is not None and not attention_mask.bool().all():
            off = attention_mask[:, None, None, :] == 0  # by key column; finfo.min, so that an empty row is no NaN
            bias = torch.zeros(off.shape, dtype=x.dtype, device=x.device).masked_fill(off, torch.finfo(x.dtype).min)
            bias = bias.expand(-1, 1, input_ids.shape[1], -1)  # (B, 1, L, L)
        for block in self.model.transformer.blocks:
            x = block(x, cos, sin, bias, rows)
        x = self.model.transformer.ln_f(x)
        if positions is not None:
            x = x.flatten(0, 1)[positions]  # (N, D)
        if targets is not None:
            return self.model.transformer.ff_out(x, targets)
        return MaskedLMOutput(logits=self.model.transformer.ff_out(x))


AutoConfig.register("llada", LLaDAConfig)
AutoModel.register(LLaDAConfig, LLaDAModelLM)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAModelLM)
