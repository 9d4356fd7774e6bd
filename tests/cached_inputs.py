"""Caches for tests of attention to a cache, with NaN wherever there is no token."""

from __future__ import annotations

import torch
from torch import Tensor

# Nothing, a part of a tile, and more than one split.
LENGTHS = (0, 5, 70)


def cached(
    head_map,
    lengths=LENGTHS,
    tokens: int = 1,
    dims: tuple[int, int] = (16, 24),
    room: int = 80,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values, tokens before heads, with NaN behind the lengths."""
    batch, make = len(lengths), {"dtype": dtype, "device": device}
    query = torch.randn(batch, tokens, head_map.num_q_heads, dims[0], **make).transpose(1, 2)
    sizes = ((head_map.num_k_heads, dims[0]), (head_map.num_v_heads, dims[1]))
    caches = [torch.randn(batch, room, heads, dim, **make).transpose(1, 2) for heads, dim in sizes]
    for b, length in enumerate(lengths):
        for cache in caches:
            cache[b, :, length:] = torch.nan
    return query, *caches


def in_pages(lengths, page_size: int, *caches: Tensor) -> tuple[Tensor, ...]:
    """The block table and the same caches in shuffled pages, with NaN where no token is.

    Entries of the table that no token needs name no page.
    """
    batch, room = caches[0].shape[0], caches[0].shape[2]
    blocks = -(-room // page_size)
    order = torch.randperm(batch * blocks + 2)
    table = torch.full((batch, blocks), -(2**30), dtype=torch.int32)
    pools = [
        torch.full((len(order), x.shape[1], page_size, x.shape[3]), torch.nan, dtype=x.dtype)
        for x in caches
    ]
    for b, length in enumerate(lengths):
        for block in range(-(-length // page_size)):
            page = table[b, block] = order[b * blocks + block]
            first, last = block * page_size, min(length, (block + 1) * page_size)
            for pool, cache in zip(pools, caches, strict=True):
                pool[page, :, : last - first] = cache[b, :, first:last].cpu()
    return tuple(x.to(caches[0].device) for x in (table, *pools))
