"""Conversion of trained checkpoints between attention layouts, with proof of what changed."""

from efficient_attn.convert.converting import convert

__all__ = ["convert"]
