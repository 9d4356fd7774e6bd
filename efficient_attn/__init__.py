"""Efficient transformer attention for any head map."""

from efficient_attn.errors import ConversionError, UnsupportedError
from efficient_attn.head_map import HeadMap

__all__ = ["ConversionError", "HeadMap", "UnsupportedError"]
