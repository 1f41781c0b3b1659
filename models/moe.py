"""Mixtures of experts as transformers models: LLaDA-MoE and LLaDA2, original tensor names, no remote code.

    LLaDA-MoE-7B-A1B    bidirectional; softmax router; config.json says model_type llada, and names LLaDAMoEModelLM
    LLaDA2.x-mini       block-causal; sigmoid router over groups of experts, a shared expert, packed q, k and v

A token's experts depend on the token alone: routers compute in float32, none has a capacity, no token is dropped. All
weights can be trained, the routers' too; their biases for the choice of experts are constants. experts.py multiplies.

Source: the checkpoints' configurations and their published modeling code (inclusionAI).
B batch, L length, D width, H heads, G key/value heads, hd head width, n = B L tokens, K experts of a token, E experts.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from models.experts import ExpertLinear, Experts
from models.head import Head
from models.llada import LLaDAModelLM, RMSNorm, check_supported, rotary


class MoEConfig(PreTrainedConfig):
    """The fields that both families have."""

    SUPPORTED = {"hidden_act": "silu", "attention_dropout": 0.0, "tie_word_embeddings": False}

    vocab_size: int = 157184
    hidden_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    num_experts: int = 64
    num_experts_per_tok: int = 8
    max_position_embeddings: int = 8192
    default_theta = 50000.0
    rope_parameters: dict | None = None  # transformers fills it from rope_theta and rope_scaling
    partial_rotary_factor: float = 1.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = False
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_supported(self, self.SUPPORTED)
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(f"config.json: a rotation of type {self.rope_parameters['rope_type']}; expected default")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"config.json: num_experts_per_tok is {self.num_experts_per_tok}; expected 1 to num_experts, "
                f"{self.num_experts}"
            )
        if self.rotated % 2 or not 0 < self.rotated <= self.head_width:
            raise ValueError(
                f"config.json: partial_rotary_factor {self.partial_rotary_factor} rotates {self.rotated} of "
                f"{self.head_width} dimensions of a head; expected an even number of them"
            )

    @property
    def head_width(self):
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def rotated(self):
        """Dimensions of a head that are rotated."""
        return int(self.head_width * self.partial_rotary_factor)


class LLaDAMoEConfig(MoEConfig):
    """LLaDA-MoE's config.json; its model_type there is llada (architecture.load_config)."""

    model_type = "lladamoe"
    SUPPORTED = MoEConfig.SUPPORTED | {
        "attention_bias": False,
        "moe_router_score_function": "softmax",
        "router_num_group": None,
        "router_topk_group": None,
    }

    expert_intermediate_size: int = 1024
    dense_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    moe_layer_freq: list[int] | int = 1
    moe_router_enable_expert_bias: bool = False
    qk_layernorm: bool = True
    clip_qkv: float | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if len(self.has_experts) != self.num_hidden_layers:
            raise ValueError(
                f"config.json: moe_layer_freq has {len(self.has_experts)} entries for {self.num_hidden_layers} layers"
            )
        if not all(self.has_experts) and not self.dense_intermediate_size:
            raise ValueError("config.json: moe_layer_freq has layers without experts, but dense_intermediate_size none")
        routed_scaling_factor = getattr(self, "routed_scaling_factor", None)
        if routed_scaling_factor not in (None, 1):
            raise ValueError(
                f"config.json: routed_scaling_factor is {routed_scaling_factor}; LLaDA-MoE's router does not scale "
                "its weights, expected 1"
            )

    @property
    def has_experts(self):
        """Of each layer, whether it has experts."""
        each = self.moe_layer_freq
        return [bool(each)] * self.num_hidden_layers if isinstance(each, int) else [bool(value) for value in each]


class LLaDA2MoeConfig(MoEConfig):
    """LLaDA2's config.json."""

    model_type = "llada2_moe"
    default_theta = 600000.0
    SUPPORTED = MoEConfig.SUPPORTED | {
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "norm_topk_prob": True,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "using_split_qkv_in_self_attention": False,
        "use_sliding_window": False,
        "norm_head": False,
        "norm_softmax": False,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
    }

    head_dim: int | None = 128
    intermediate_size: int = 5120
    moe_intermediate_size: int = 512
    num_shared_experts: int | None = 1
    first_k_dense_replace: int = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        each, rest = divmod(self.num_experts, self.n_group)
        if rest or each < 2:
            raise ValueError(
                f"config.json: n_group {self.n_group} must divide num_experts {self.num_experts} into groups of at "
                "least 2"
            )
        if not 1 <= self.topk_group <= self.n_group or self.num_experts_per_tok > self.topk_group * each:
            raise ValueError(
                f"config.json: topk_group {self.topk_group} of {self.n_group} groups of {each} experts cannot give "
                f"num_experts_per_tok {self.num_experts_per_tok}"
            )


def turned(x, cos, sin):
    """Rotate the first dimensions of x (B, H, L, hd), as many as cos and sin (L, r) have, in the dtype of x."""
    rest = x[..., cos.shape[1] :]
    x = x[..., : cos.shape[1]]
    a, b = x.chunk(2, -1)
    return torch.cat((x * cos + torch.cat((-b, a), -1) * sin, rest), -1)


def attention(q, k, v, bias, rows, layer):
    """q (B, H, L, hd), k and v (B, G, L, hd) of layer number `layer` -> (B, L, H hd)."""
    if rows is None:
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])
    else:
        h = rows.attend(q, k, v, layer=layer)
    return h.transpose(1, 2).flatten(2)


class LLaDAMoEAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D, hd, self.layer, self.clip = config.hidden_size, config.head_width, layer, config.clip_qkv
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, self.heads * hd, bias=False)
        self.k_proj = nn.Linear(D, self.kv_heads * hd, bias=False)
        self.v_proj = nn.Linear(D, self.kv_heads * hd, bias=False)
        self.o_proj = nn.Linear(self.heads * hd, D, bias=False)
        if config.qk_layernorm:
            self.q_norm = RMSNorm(hd, config.rms_norm_eps)
            self.k_norm = RMSNorm(hd, config.rms_norm_eps)

    def forward(self, x, cos, sin, bias, rows):
        projected = ((self.q_proj(x), self.heads), (self.k_proj(x), self.kv_heads), (self.v_proj(x), self.kv_heads))
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y, heads in projected)  # (B, H, L, hd)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (tensor.clamp(-self.clip, self.clip) for tensor in (q, k, v))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        return self.o_proj(attention(q, k, v, bias, rows, self.layer))


class LLaDA2MoeAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D, hd, self.layer = config.hidden_size, config.head_width, layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.query_key_value = nn.Linear(D, (self.heads + 2 * self.kv_heads) * hd, bias=False)
        self.query_layernorm = RMSNorm(hd, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(hd, config.rms_norm_eps)
        self.dense = nn.Linear(self.heads * hd, D, bias=False)

    def forward(self, x, cos, sin, bias, rows):
        parts = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = self.query_key_value(x).unflatten(-1, (sum(parts), -1)).transpose(1, 2).split(parts, 1)
        q, k = turned(self.query_layernorm(q), cos, sin), turned(self.key_layernorm(k), cos, sin)
        return self.dense(attention(q, k, v, bias, rows, self.layer))


class MLP(nn.Module):
    """SwiGLU: a dense layer, or a shared expert."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """x (n, D) -> a logit of each expert (n, E), in float32. No nn.Linear: LoRA and 4 bits leave it alone."""

    def __init__(self, count, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, x):
        return F.linear(x.float(), self.weight.float())


class SoftmaxMixture(nn.Module):
    """LLaDA-MoE: the K most probable of E experts, weighed by their probabilities as they are."""

    def __init__(self, config):
        super().__init__()
        self.each = config.num_experts_per_tok
        self.gate = Router(config.num_experts, config.hidden_size)
        self.experts = Experts(config.num_experts, config.hidden_size, config.expert_intermediate_size)
        self.register_buffer(
            "expert_bias", torch.zeros(config.num_experts) if config.moe_router_enable_expert_bias else None
        )

    def route(self, x):
        """x (n, D) -> each token's experts (n, K) int64, and their weights (n, K) float32."""
        probabilities = self.gate(x).softmax(-1)
        if self.expert_bias is not None:
            probabilities = probabilities + self.expert_bias
        weights, chosen = probabilities.topk(self.each)
        return chosen, weights

    def forward(self, x):
        return self.experts(x.flatten(0, 1), *self.route(x.flatten(0, 1))).view(x.shape)


class GroupRouter(Router):
    """LLaDA2's router. expert_bias (E,): added for the choice of experts, not to their weights; not trained."""

    def __init__(self, count, width):
        super().__init__(count, width)
        self.register_buffer("expert_bias", torch.zeros(count))


class GroupMixture(nn.Module):
    """LLaDA2: K experts from the best groups, weighed by their sigmoids, normalized and scaled; a shared expert."""

    def __init__(self, config):
        super().__init__()
        self.each, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.groups, self.kept = config.n_group, config.topk_group
        self.gate = GroupRouter(config.num_experts, config.hidden_size)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        if config.num_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)

    def route(self, x):
        """As SoftmaxMixture.route. A group's score is the sum of its two best experts'."""
        scores = self.gate(x).sigmoid()  # (n, E)
        grouped = (scores.detach() + self.gate.expert_bias).unflatten(1, (self.groups, -1))  # (n, groups, E / groups)
        best = grouped.topk(2).values.sum(-1).topk(self.kept).indices  # (n, kept)
        is_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
        chosen = grouped.masked_fill(is_out[..., None], -torch.inf).flatten(1).topk(self.each).indices
        weights = scores.gather(1, chosen)  # without the bias
        if self.each > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scale

    def forward(self, x):
        y = self.experts(x.flatten(0, 1), *self.route(x.flatten(0, 1))).view(x.shape)
        return y + self.shared_experts(x) if hasattr(self, "shared_experts") else y


class LLaDAMoEBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer):
        super().__init__()
        D = config.hidden_size
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = LLaDAMoEAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        has_experts = config.has_experts[layer]
        self.mlp = SoftmaxMixture(config) if has_experts else MLP(D, config.dense_intermediate_size)
        if config.shared_expert_intermediate_size:
            self.shared_expert = MLP(D, config.shared_expert_intermediate_size)

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        h = self.post_attention_layernorm(x)
        x = x + self.mlp(h)
        return x + self.shared_expert(h) if hasattr(self, "shared_expert") else x


class LLaDA2MoeBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer):
        super().__init__()
        D, is_dense = config.hidden_size, layer < config.first_k_dense_replace
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.attention = LLaDA2MoeAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.mlp = MLP(D, config.intermediate_size) if is_dense else GroupMixture(config)

    def forward(self, x, *context):
        x = x + self.attention(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class MoEModel(nn.Module):
    """Embedding, under the family's name, blocks and final norm; the head belongs to MoEModelLM."""

    def __init__(self, config, embedding, block):
        super().__init__()
        # An embedding of the padding token gets no gradient, as in the original.
        setattr(self, embedding, nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id))
        self.layers = nn.ModuleList(block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MoEModelLM(LLaDAModelLM):
    """Mask predictor: logits[i] predicts token i. Its subclasses say how the family names its parts."""

    EMBEDDING = BLOCK = None
    _tied_weights_keys = {}

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.model = MoEModel(config, self.EMBEDDING, self.BLOCK)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        """Normal(0, initializer_range), norms 1, biases 0; only training from scratch uses it."""
        if isinstance(module, (nn.Linear, nn.Embedding, ExpertLinear, Router)):
            init.normal_(module.weight, 0.0, self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        if getattr(module, "expert_bias", None) is not None:
            init.zeros_(module.expert_bias)

    def get_input_embeddings(self):
        return getattr(self.model, self.EMBEDDING)

    def set_input_embeddings(self, embeddings):
        setattr(self.model, self.EMBEDDING, embeddings)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    def rotary(self, length, device):
        return rotary(length, self.config.rotated, self.config.rope_parameters["rope_theta"], device)

    def forward(self, input_ids, attention_mask=None, positions=None, targets=None, rows=None):
        """As LLaDAModelLM.forward. attention_mask: (B, L), 1 = real, or (B or 1, 1, L, L) bool, true = is seen."""
        x = self.get_input_embeddings()(input_ids)  # (B, L, D)
        places = rows.places if rows else slice(None)
        longest = rows.longest if rows else input_ids.shape[1]
        cos, sin = (table[places].to(x.dtype) for table in self.rotary(longest, x.device))  # (L, r)
        bias = bias_of(attention_mask, x)
        for block in self.model.layers:
            x = block(x, cos, sin, bias, rows)
        x = self.model.norm(x)
        if positions is not None:
            x = x.flatten(0, 1)[positions]  # (N, D)
        if targets is not None:
            return self.lm_head(x, targets)
        return MaskedLMOutput(logits=self.lm_head(x))


def bias_of(attention_mask, x):
    """What attention adds to the products with keys that a mask hides, (B, 1, L or 1, keys); None if it hides none."""
    if attention_mask is None or attention_mask.bool().all():
        return None
    off = (attention_mask[:, None, None, :] if attention_mask.dim() == 2 else attention_mask) == 0
    lowest = torch.finfo(x.dtype).min  # not -inf, so that an empty row is no NaN
    bias = torch.zeros(off.shape, dtype=x.dtype, device=x.device).masked_fill(off, lowest)
    return bias.expand(-1, 1, x.shape[1], -1)


class LLaDAMoEModelLM(MoEModelLM):
    config_class = LLaDAMoEConfig
    EMBEDDING, BLOCK = "embed_tokens", LLaDAMoEBlock
    _no_split_modules = ["LLaDAMoEBlock"]


class LLaDA2MoeModelLM(MoEModelLM):
    config_class = LLaDA2MoeConfig
    EMBEDDING, BLOCK = "word_embeddings", LLaDA2MoeBlock
    _no_split_modules = ["LLaDA2MoeBlock"]


for _model in (LLaDAMoEModelLM, LLaDA2MoeModelLM):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModel.register(_model.config_class, _model)
    AutoModelForMaskedLM.register(_model.config_class, _model)
