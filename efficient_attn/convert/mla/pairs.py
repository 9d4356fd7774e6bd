"""Rotary pairs as complex numbers, and what turning does to second moments.

Channels ``f`` and ``f + F`` of a key head are the number ``z = k_f + i k_{f + F}``. Rotary
embedding multiplies it by ``exp(i n theta_f)`` at position ``n``, so the score of a query and a key
depends on their distance through ``exp(-i n theta_f)``, ``n`` tokens back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights


def rows_of_pairs(mix: Tensor, head_dim: int) -> Tensor:
    """The real form of complex combinations of pairs.

    Args:
        mix: ``(n, g, F)`` complex; combination ``i`` is the sum of ``mix[i, h, f] z[h, f]``.
        head_dim: Width ``d`` of a head; channels from ``2 F`` on get zeros.

    Returns:
        ``(2 n, g d)``: the real part of combination ``i`` in row ``2 i``, the imaginary after.
    """
    count, heads, pairs = mix.shape
    rest = mix.real.new_zeros(count, heads, head_dim - 2 * pairs)
    real = torch.cat((mix.real, -mix.imag, rest), -1)
    imaginary = torch.cat((mix.imag, mix.real, rest), -1)
    return torch.stack((real, imaginary), 1).reshape(2 * count, heads * head_dim)


def pairs_of(weights: GroupedAttentionWeights) -> int:
    """Rotary pairs ``F`` of each head."""
    return len(weights.inverse_frequencies)


def query_gain(weights: GroupedAttentionWeights) -> Tensor:
    """Factors ``(d,)`` on query channels that stand for the rotary scale of both sides."""
    gain = torch.ones(weights.head_dim, dtype=torch.float64)
    gain[: 2 * pairs_of(weights)] = weights.rotary_scale**2
    return gain


def key_heads_of(weights: GroupedAttentionWeights) -> Tensor:
    """Key head ``(H,)`` that each query head reads."""
    return torch.arange(weights.num_heads) * weights.num_kv_heads // weights.num_heads
