"""Attention as ``nn.Module``."""

from efficient_attn.layers.grouped import GroupedQueryAttention
from efficient_attn.layers.multihead import MultiheadAttention
from efficient_attn.layers.rotary import RotaryEmbedding

__all__ = ["GroupedQueryAttention", "MultiheadAttention", "RotaryEmbedding"]
