"""Helpers for testing attention, ours or your own: inputs, head maps and an error budget."""

from efficient_attn.testing.factories import head_maps, qkv
from efficient_attn.testing.tolerance import assert_accurate

__all__ = ["assert_accurate", "head_maps", "qkv"]
