"""Norms of key heads and groups of query heads, in ATen: no loop depends on data."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.kernels.conventions import SMALLEST_SPREAD, accumulator


def key_norms(key: Tensor, key_lengths: Tensor | None) -> Tensor:
    """The ``key_norms`` op.

    Tokens are added in fp64, so that neither padding nor the number of threads shows in the result.
    """
    dtype = accumulator(key.dtype)
    squares = torch.linalg.vector_norm(key, dim=-1, dtype=dtype).square_()
    if key_lengths is not None:
        tokens = torch.arange(key.shape[2], device=key.device)
        squares = squares.where(tokens < key_lengths[:, None, None], 0.0)
    return squares.sum(-1, dtype=torch.float64).sqrt_().float()


def allocate_heads(
    scores: Tensor, num_heads: int, min_queries: int, min_max: bool, nearest: bool
) -> tuple[Tensor, Tensor]:
    """The ``allocate_heads`` op."""
    rows, groups = scores.shape
    low, high = scores.aminmax(dim=-1, keepdim=True)
    shares = (scores - low) / (high - low) if min_max else scores
    total = shares.sum(-1, keepdim=True, dtype=torch.float64).float()
    # Comparisons with NaN are false, and so is inf - low > inf.
    tells = (low >= 0) & (high - low > SMALLEST_SPREAD * high) & total.isfinite()
    free = num_heads - min_queries * groups
    quotas = (shares / total * free).where(tells, 0.0)
    sizes = (_nearest if nearest else _largest_remainders)(quotas, free) + min_queries
    number = torch.arange(max(groups, num_heads), device=scores.device)
    even = num_heads // groups + (number[:groups] < num_heads % groups)
    sizes = sizes.where(tells, even)
    # right=True steps over empty groups, whose end equals their start.
    heads = number[:num_heads].expand(rows, -1).contiguous()
    index = torch.searchsorted(sizes.cumsum(-1), heads, right=True)
    return sizes.int(), index.int()


def is_recomputed(like: Tensor) -> Tensor:
    """The ``is_recomputed`` op."""
    inside_of_backward = torch._C._current_graph_task_id() != -1
    return like.new_full((), inside_of_backward, dtype=torch.bool)


def _nearest(quotas: Tensor, free: int) -> Tensor:
    sizes = quotas.round().long()
    # Every quota is rounded by at most a half, so this many steps always suffice.
    for _ in range(quotas.shape[-1] // 2):
        excess = sizes.sum(-1, keepdim=True) - free
        largest, smallest = sizes.argmax(-1, keepdim=True), sizes.argmin(-1, keepdim=True)
        sizes.scatter_add_(-1, largest.where(excess > 0, smallest), -excess.sign())
    return sizes


def _largest_remainders(quotas: Tensor, free: int) -> Tensor:
    sizes = quotas.floor().long()
    by_remainder = (quotas - sizes).argsort(dim=-1, descending=True, stable=True)
    left = free - sizes.sum(-1, keepdim=True)
    one_more = torch.arange(quotas.shape[-1], device=quotas.device) < left
    return sizes.scatter_add_(-1, by_remainder, one_more.long())
