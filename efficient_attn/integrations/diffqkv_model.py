"""A causal language model with DiffQKV attention for transformers: Llama with other heads.

Importing this module registers the classes, so that the Auto classes know them::

    from efficient_attn.integrations.diffqkv_model import DiffQKVConfig, DiffQKVForCausalLM
    model = DiffQKVForCausalLM(DiffQKVConfig.sigma_1_5b())
    model.save_pretrained(path)
    AutoModelForCausalLM.from_pretrained(path)

``attn_implementation="efficient_attn"`` reads every head once and decodes from this package's
caches where they lie. All others work too, and so do all caches of transformers, on joined heads
(:mod:`~efficient_attn.integrations.wide_heads`).
"""

from __future__ import annotations

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from efficient_attn.head_map import HeadMap
from efficient_attn.integrations import transformers as ours
from efficient_attn.integrations.wide_heads import own_part, widen
from efficient_attn.layers.diffqkv import DiffQKVAttention, LinearFromZero


@strict
class DiffQKVConfig(LlamaConfig):
    """A Llama configuration with separate head counts.

    Args:
        num_key_heads: Number of key heads; by default that of query heads.
        num_value_heads: Number of value heads; by default that of query heads.
        head_dim: Width of a cached key and of the rotary embedding; by default
            ``hidden_size / num_attention_heads``.
        v_head_dim: Width of a value head; by default ``hidden_size / num_attention_heads``.
        query_head_dim: Width of a query head before its key head's ``key_up`` matrix narrows it to
            ``head_dim``; None where queries are as wide as keys.
        augmented_query_dim: Inner width of the augmented query; 0 for none.
        query_residual: Whether the augmented query is added to the query as projected.

    Source: Lin et al., Sigma, arXiv 2501.13629, table 14 for the presets.
    """

    model_type = "diffqkv"

    num_key_heads: int | None = None
    num_value_heads: int | None = None
    v_head_dim: int | None = None
    query_head_dim: int | None = None
    augmented_query_dim: int = 0
    query_residual: bool = False

    def __post_init__(self, **kwargs):
        """Fill in what follows from the rest."""
        heads = self.num_attention_heads
        if self.num_key_heads is None:
            self.num_key_heads = heads
        if self.num_value_heads is None:
            self.num_value_heads = heads
        if self.v_head_dim is None:
            self.v_head_dim = self.hidden_size // heads
        HeadMap.diff(heads, k=self.num_key_heads, v=self.num_value_heads)  # refuses what is none
        # What code that knows one number of heads sees: that of the joined ones.
        self.num_key_value_heads = math.gcd(self.num_key_heads, self.num_value_heads)
        if self.augmented_query_dim:
            # The augmented query mixes all heads: it is gathered between its projections.
            self.base_model_tp_plan = {
                **self.base_model_tp_plan,
                "layers.*.self_attn.q_proj": "colwise_gather_output",
                "layers.*.self_attn.q_gate_proj": "colwise_gather_output",
                "layers.*.self_attn.q_up_proj": "colwise_gather_output",
                "layers.*.self_attn.q_down_proj": "colwise",
            }
        super().__post_init__(**kwargs)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}; rotary embedding turns pairs of a key's channels, "
                "so it must be a positive even width."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, object], **kwargs: object) -> DiffQKVConfig:
        """As in the base class; the configuration of another architecture is a ValueError."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"the checkpoint is of model_type {kind!r}, not {cls.model_type!r}; make one of it "
                "by `efficient-attn convert diffqkv SRC DST --key-heads N`."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def sigma_1_5b(cls, **changes: object) -> DiffQKVConfig:
        """Sigma-1.5B: 2.02 billion parameters with its augmented query and tied embeddings."""
        return cls(**_SIGMA | _SIGMA_1_5B | changes)

    @classmethod
    def sigma_10b(cls, **changes: object) -> DiffQKVConfig:
        """Sigma-10B: 9.99 billion parameters with tied embeddings."""
        return cls(**_SIGMA | _SIGMA_10B | changes)


_SIGMA = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_heads": 4,
    "num_value_heads": 16,
    "tie_word_embeddings": True,
}
_SIGMA_1_5B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 26,
    "augmented_query_dim": 3072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}
_SIGMA_10B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "augmented_query_dim": 6144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


class DiffQKVModelAttention(DiffQKVAttention):
    """:class:`~efficient_attn.layers.DiffQKVAttention` under the interface of transformers."""

    def __init__(self, config: DiffQKVConfig, layer_idx: int) -> None:
        wide_query = config.query_head_dim is not None
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            num_key_heads=config.num_key_heads,
            num_value_heads=config.num_value_heads,
            head_dim=config.query_head_dim if wide_query else config.head_dim,
            key_head_dim=config.head_dim,
            v_head_dim=config.v_head_dim,
            key_compress="linear_up" if wide_query else "direct",
            augmented_query_dim=config.augmented_query_dim,
            query_residual=config.query_residual,
            bias=config.attention_bias,
            causal=True,
        )
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as a decoder layer of transformers asks."""
        query, key, value = self.project(hidden_states, hidden_states)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        counts = key.shape[1], value.shape[1]
        implementation = self.config._attn_implementation
        wide = implementation != ours.NAME or _has_one_number_of_heads(past_key_values)
        if wide:
            query, key, value = widen(query, key, value)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scale, **kwargs
        )
        if wide:
            out = own_part(out, *counts)
        return self.o_proj(out.flatten(2)), weights


def _has_one_number_of_heads(cache: Cache | None) -> bool:
    """Whether memory for values is taken by the head count of keys, as static caches do."""
    if cache is None:
        return False
    kinds = (*map(type, cache.layers), getattr(cache, "layer_class_to_replicate", None))
    return any(isinstance(kind, type) and issubclass(kind, StaticLayer) for kind in kinds)


class DiffQKVDecoderLayer(LlamaDecoderLayer):
    """Llama's, around another attention."""

    def __init__(self, config: DiffQKVConfig, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)  # Llama's own would build its attention first
        self.hidden_size = config.hidden_size
        self.self_attn = DiffQKVModelAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DiffQKVPreTrainedModel(LlamaPreTrainedModel):
    """What all models of this kind share."""

    config: DiffQKVConfig
    config_class = DiffQKVConfig
    _no_split_modules = ["DiffQKVDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": DiffQKVDecoderLayer,
        "attentions": DiffQKVModelAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LinearFromZero):
            module.reset_parameters()
        elif isinstance(module, DiffQKVModelAttention):
            module.reset_key_up()
        else:
            super()._init_weights(module)


class DiffQKVModel(DiffQKVPreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: DiffQKVConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [DiffQKVDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DiffQKVForCausalLM(DiffQKVPreTrainedModel, LlamaForCausalLM):
    """The decoder with a language modelling head."""

    def __init__(self, config: DiffQKVConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DiffQKVModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(DiffQKVConfig.model_type, DiffQKVConfig, exist_ok=True)
AutoModel.register(DiffQKVConfig, DiffQKVModel, exist_ok=True)
AutoModelForCausalLM.register(DiffQKVConfig, DiffQKVForCausalLM, exist_ok=True)
