"""Helpers for testing attention, ours or your own: inputs, head maps and an error budget."""

from efficient_attn.testing.factories import head_maps, qkv
from efficient_attn.testing.implementations import implementation
from efficient_attn.testing.tolerance import assert_accurate
from efficient_attn.testing.without import without_native_kernels

__all__ = ["assert_accurate", "head_maps", "implementation", "qkv", "without_native_kernels"]
