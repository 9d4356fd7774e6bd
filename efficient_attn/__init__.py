"""Efficient transformer attention for any head map."""

from typing import TYPE_CHECKING

from efficient_attn.errors import CacheFullError, ConversionError, UnsupportedError
from efficient_attn.functional import (
    attention,
    attention_decode,
    attention_varlen,
    merge_states,
    mla_decode,
)
from efficient_attn.head_map import HeadMap

if TYPE_CHECKING:
    from efficient_attn.integrations.patching import patch_model

__all__ = [
    "CacheFullError",
    "ConversionError",
    "HeadMap",
    "UnsupportedError",
    "attention",
    "attention_decode",
    "attention_varlen",
    "merge_states",
    "mla_decode",
    "patch_model",
]


def __getattr__(name: str) -> object:
    # Layers and integrations are heavier than the functions, so they load when asked for.
    if name == "patch_model":
        from efficient_attn.integrations.patching import patch_model

        return patch_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
