"""Unequal numbers of key and value heads, for code that knows one number for both.

With ``c`` the greatest common divisor of the two numbers, neighbouring key heads are joined into
``c`` wide ones, and so are value heads. A query is padded with zeros to the width of its joined
keys, so its scores stay the same; of its output, the part of its own value head is kept. This is
exact. Where each key head has several value heads, the usual case, queries need no padding.
"""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange
from torch import Tensor


def widen(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same attention with as many key heads as value heads.

    The scale of the scores is still that of the width before.

    Shape:
        - query: ``(B, Hq, N, D)`` to ``(B, Hq, N, D Hk / c)``
        - key: ``(B, Hk, M, D)`` to ``(B, c, M, D Hk / c)``
        - value: ``(B, Hv, M, Dv)`` to ``(B, c, M, Dv Hv / c)``
    """
    heads = math.gcd(key.shape[1], value.shape[1])
    joined_keys = key.shape[1] // heads
    if joined_keys > 1:
        places = torch.eye(joined_keys, dtype=query.dtype, device=query.device)
        query = rearrange(query, "b (c a g) n d -> b c a g n d", c=heads, a=joined_keys)
        query = einsum(query, places, "b c a g n d, a place -> b c a g n place d")
        query = rearrange(query, "b c a g n place d -> b (c a g) n (place d)")
    key, value = (rearrange(x, "b (c r) m d -> b c m (r d)", c=heads) for x in (key, value))
    return query, key, value


def own_part(out: Tensor, num_key_heads: int, num_value_heads: int) -> Tensor:
    """Of each query head's wide output, the part of its own value head.

    Shape:
        - out: ``(B, N, Hq, Dv Hv / c)`` to ``(B, N, Hq, Dv)``
    """
    heads = math.gcd(num_key_heads, num_value_heads)
    joined = num_value_heads // heads
    out = rearrange(out, "b n (c r g) (part d) -> b n c r g part d", c=heads, r=joined, part=joined)
    return torch.einsum("bncrgrd->bncrgd", out).flatten(2, 4)
