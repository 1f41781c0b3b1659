"""Nemotron-Labs-Diffusion: transformers' Ministral3 under the original's tensor names.

config.json + *.safetensors (nvidia/Nemotron-Labs-Diffusion-*) -> logits. Names: encoder.*, diffusion_head.weight.

Positions rotate by YaRN, and after the rotation q is multiplied by 1 + beta ln(1 + floor(position / original length)),
all by config.json's rope_parameters (Ministral3Attention). B batch, L length, V vocabulary.
"""

from torch import nn
from transformers import AutoConfig, Ministral3Config, Ministral3Model
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.ministral3.modeling_ministral3 import Ministral3PreTrainedModel


class NemotronConfig(Ministral3Config):
    """config.json's fields. pad_token_id: no token unless named, as a padding token's embedding is never trained."""

    model_type = "nemotron_labs_diffusion"
    pad_token_id: int | None = None


class NemotronModelLM(Ministral3PreTrainedModel):
    """Mask predictor: the logits of a noisy token predict that token, those of a causal one the next."""

    config_class = NemotronConfig
    base_model_prefix = "encoder"
    _tied_weights_keys = {"diffusion_head.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.encoder = Ministral3Model(config)
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.diffusion_head

    def set_output_embeddings(self, head):
        self.diffusion_head = head

    def forward(self, input_ids, **options):
        """input_ids (B, L); options: Ministral3Model's. Returns logits (B, L, V), or what Head makes of them."""
        return MaskedLMOutput(logits=self.diffusion_head(self.encoder(input_ids, **options).last_hidden_state))


AutoConfig.register("nemotron_labs_diffusion", NemotronConfig)
