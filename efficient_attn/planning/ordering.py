"""Tokens in the order of their codes, within segments."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_order(
    codes: Tensor, bins: int, sizes: list[int], tokens: int, first: int
) -> tuple[Tensor, Tensor]:
    """The ``segment_order`` op: rows by segment, then by code, then by number, at every level.

    Segments of a level are of one size, counted from position 0. Rows may be several times the
    same tokens.

    Args:
        codes: In ``[0, bins)``.
        bins: Number of different codes that there could be.
        sizes: Tokens in a segment of each level.
        tokens: Number of different tokens; row ``r`` is token ``r % tokens``.
        first: The position of token 0.

    Shape:
        - codes: ``(B, H, rows)``, int32
        - order, rank: ``(B, H, levels, rows)``, int32, inverse to each other
    """
    position = torch.arange(codes.shape[-1], device=codes.device) % tokens + first
    levels = torch.tensor(sizes, device=codes.device).unsqueeze(-1)
    segment = torch.div(position, levels, rounding_mode="floor")
    order = torch.argsort(segment * bins + codes.unsqueeze(2), stable=True)
    index = torch.arange(order.shape[-1], device=order.device, dtype=torch.int32)
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, index.expand_as(order))
    return order.int(), rank
