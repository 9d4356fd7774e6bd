"""Efficient transformer attention for any head map."""

from efficient_attn.errors import ConversionError, UnsupportedError
from efficient_attn.functional import attention, attention_varlen, merge_states
from efficient_attn.head_map import HeadMap

__all__ = [
    "ConversionError",
    "HeadMap",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "merge_states",
]
