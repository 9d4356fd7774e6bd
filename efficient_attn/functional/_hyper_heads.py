"""HyperAttention knows even groups of query heads: every other map is written out to more heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from efficient_attn.head_map import HeadMap


def even_heads(
    query: Tensor, key: Tensor, value: Tensor, q_to_k: Tensor | None, q_to_v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys and values with one number of heads, in even groups of query heads."""
    counts = (key.shape[1], value.shape[1])
    if q_to_k is None and q_to_v is None:
        heads = math.lcm(*counts)
        return tuple(
            x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
            for x in (key, value)
        )
    head_map = HeadMap(query.shape[1], *counts, q_to_k, q_to_v)
    return _written_out(key, head_map.key_index(key.device)), _written_out(
        value, head_map.value_index(value.device)
    )


def _written_out(x: Tensor, index: Tensor) -> Tensor:
    """``(B, G, N, D)`` with a head for each entry of ``(H,)`` or ``(B, H)``."""
    if index.dim() == 1:
        return x.index_select(1, index)
    samples = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
    return x[samples, index]
