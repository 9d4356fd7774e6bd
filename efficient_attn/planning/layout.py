"""Where things lie: leaves, the exact keys of a query, and the segments of the recursion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Queries that share a segment of keys to approximate, at one level of the recursion.

    ``queries`` are indices of queries, ``keys`` positions of keys; both end before their second.
    """

    level: int
    queries: tuple[int, int]
    keys: tuple[int, int]


def query_positions(nq: int, nk: int, device: torch.device) -> Tensor:
    """The key position at which each query stands; the last query stands at the last key.

    A negative position is before every key, and under a causal mask sees nothing.
    """
    return torch.arange(nq, device=device) + (nk - nq)


def leaf_range(nq: int, nk: int, leaf: int, causal: bool) -> tuple[int, int]:
    """The number of the first leaf, and the number of leaves, that a plan has.

    Leaves are numbered from key 0. Queries before it are in leaves of negative number.
    """
    first = 0 if causal else min((nk - nq) // leaf, 0)
    return first, -(-nk // leaf) - first


def near_keys(
    positions: Tensor, nk: int, leaf: int, window: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """The exact keys ``[first, end)`` of queries at the given positions, sinks apart.

    A leaf's own keys, as far as they are visible, and a window beside it; none if ``leaf`` is 0.
    """
    if leaf == 0:
        return torch.zeros_like(positions), torch.zeros_like(positions)
    start = torch.div(positions, leaf, rounding_mode="floor") * leaf
    first = (start - window).clamp(min=0)
    end = positions + 1 if causal else start + leaf + window
    return first, end.clamp(min=0, max=nk)


def recursion_leaf(nk: int, smallest: int) -> tuple[int, int]:
    """Depth of the halving recursion, and the length at which it stops.

    The published recursion halves until a part is no longer than ``smallest``, and then computes a
    quarter exactly if its side is shorter than that. So the exact parts have at least ``smallest``
    and fewer than twice as many keys.
    """
    levels = 0
    while -(-nk // 2 ** (levels + 1)) >= smallest:
        levels += 1
    return levels, -(-nk // 2**levels)


def recursion_problems(nq: int, nk: int, levels: int, leaf: int) -> list[Problem]:
    """Every quarter of the causal recursion: second halves looking back at first halves."""
    corner = nk - nq
    problems = []
    for level in range(levels):
        size = leaf << level
        for start in range(size, nk, 2 * size):
            first, end = max(start - corner, 0), min(start + size, nk) - corner
            if first < end:
                problems.append(Problem(level, (first, end), (start - size, start)))
    return problems
