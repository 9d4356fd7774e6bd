"""Inputs for attention tests."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.head_map import HeadMap


def head_maps(batch: int = 2) -> dict[str, HeadMap]:
    """One head map of every kind, each for 6 query heads.

    Args:
        batch: Number of rows of the maps that have one row per sample.
    """
    return {
        "mha": HeadMap.mha(6),
        "mqa": HeadMap.mqa(6),
        "gqa": HeadMap.gqa(6, 2),
        "more value heads": HeadMap.diff(6, k=2, v=3),
        "more key heads": HeadMap.diff(6, k=6, v=2),
        "uneven": HeadMap.from_group_sizes([1, 4, 1]),
        "empty groups": HeadMap.from_group_sizes([0, 5, 0, 1]),
        "permuted": HeadMap.from_index([2, 0, 1, 2, 1, 0]),
        "keys apart from values": HeadMap.from_index(
            [2, 0, 1, 2, 0, 0], [0, 1, 1, 0, 1, 0], num_k_heads=4
        ),
        "one row per sample": HeadMap.from_index(
            torch.arange(6 * batch).reshape(batch, 6) % 5 % 3, num_k_heads=3
        ),
    }


def qkv(
    head_map: HeadMap,
    batch: int = 2,
    lengths: tuple[int, int] = (16, 16),
    dims: tuple[int, int] = (16, 16),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "tokens",
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random normal query, key and value for a head map.

    Args:
        head_map: Gives the head counts.
        batch: Number of samples.
        lengths: Numbers of query and of key tokens.
        dims: Head dims of queries and keys, and of values.
        dtype: Of all three.
        device: Of all three.
        layout: How they are stored: ``"tokens"`` before heads, ``"heads"`` before tokens,
            ``"strided"`` with a gap after every element, or ``"broadcast"`` over the batch.
        requires_grad: Of all three.

    Shape:
        - query: ``(B, Hq, Nq, D)``; key: ``(B, Hk, Nk, D)``; value: ``(B, Hv, Nk, Dv)``
    """
    shapes = (
        (batch, head_map.num_q_heads, lengths[0], dims[0]),
        (batch, head_map.num_k_heads, lengths[1], dims[0]),
        (batch, head_map.num_v_heads, lengths[1], dims[1]),
    )
    return tuple(
        _stored(shape, layout, dtype, device).requires_grad_(requires_grad) for shape in shapes
    )


def _stored(shape, layout: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    batch, heads, tokens, dim = shape
    make = {"dtype": dtype, "device": device}
    if layout == "tokens":
        return torch.randn(batch, tokens, heads, dim, **make).transpose(1, 2)
    if layout == "heads":
        return torch.randn(shape, **make)
    if layout == "strided":
        return torch.randn(batch, tokens, dim, heads, 2, **make)[..., 1].permute(0, 3, 1, 2)
    if layout == "broadcast":
        return torch.randn(1, heads, tokens, dim, **make).expand(shape)
    raise ValueError(
        f"layout is {layout!r}; it must be 'tokens', 'heads', 'strided' or 'broadcast'."
    )
