"""Efficient transformer attention for any head map."""

from typing import TYPE_CHECKING

from efficient_attn.config import HyperConfig
from efficient_attn.errors import CacheFullError, ConversionError, UnsupportedError
from efficient_attn.functional import (
    allocate_heads,
    attention,
    attention_decode,
    attention_varlen,
    difference_scores,
    ema_scores,
    hyper_attention,
    hyper_attention_varlen,
    hyper_plan,
    key_norms,
    khan2024_scores,
    merge_states,
    mla_decode,
    perturb_heads,
)
from efficient_attn.head_map import HeadMap
from efficient_attn.planning import HyperPlan

if TYPE_CHECKING:
    from efficient_attn.integrations.patching import patch_model

__all__ = [
    "CacheFullError",
    "ConversionError",
    "HeadMap",
    "HyperConfig",
    "HyperPlan",
    "UnsupportedError",
    "allocate_heads",
    "attention",
    "attention_decode",
    "attention_varlen",
    "difference_scores",
    "ema_scores",
    "hyper_attention",
    "hyper_attention_varlen",
    "hyper_plan",
    "key_norms",
    "khan2024_scores",
    "merge_states",
    "mla_decode",
    "patch_model",
    "perturb_heads",
]


def __getattr__(name: str) -> object:
    # Layers and integrations are heavier than the functions, so they load when asked for.
    if name == "patch_model":
        from efficient_attn.integrations.patching import patch_model

        return patch_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
