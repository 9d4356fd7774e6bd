"""Caches for the decode kernels, and their comparison with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn import reference
from efficient_attn.kernels.triton import decode
from efficient_attn.testing import assert_accurate
from tests.kernels.triton.oracle import DEVICE

# Nothing, a part of a tile, and more than one split.
LENGTHS = (0, 5, 70)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def cached(head_map, lengths=LENGTHS, tokens=1, dims=(16, 24), room=80, dtype=torch.float32):
    """Query, keys and values, tokens before heads, with NaN behind the lengths."""
    batch = len(lengths)
    query = randn(batch, tokens, head_map.num_q_heads, dims[0], dtype=dtype).transpose(1, 2)
    sizes = ((head_map.num_k_heads, dims[0]), (head_map.num_v_heads, dims[1]))
    caches = [randn(batch, room, heads, dim, dtype=dtype).transpose(1, 2) for heads, dim in sizes]
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
    return tuple(x.to(DEVICE) for x in (table, *pools))


def run(query, key, value, lengths, table=None, head_map=None, **options) -> tuple[Tensor, Tensor]:
    """The kernel, with the options of the reference."""
    maps = (None, None) if head_map is None else (head_map.q_to_k, head_map.q_to_v)
    window = options.get("window")
    return decode.decode(
        query, key, value, torch.tensor(lengths, device=DEVICE), table, *maps,
        None if window is None else window[0], options.get("scale", query.shape[-1] ** -0.5),
        options.get("softcap", 0.0),
    )  # fmt: skip


def compare(query, key, value, lengths, head_map, floor=2e-6, **options) -> tuple[Tensor, Tensor]:
    """Assert that the kernel is as near to the truth as the plain formula in the same dtype."""
    head_map = head_map.to(DEVICE)
    results = run(query, key, value, lengths, head_map=head_map, **options)
    options |= {"cache_lengths": torch.tensor(lengths, device=DEVICE), "head_map": head_map}
    inputs = (query, key, value)
    truths = reference.attention_decode(*(x.double() for x in inputs), **options)
    plains = reference.attention_decode(*inputs, **options)
    for result, truth, plain in zip(results, truths, plains, strict=True):
        assert result.shape == truth.shape
        assert_accurate(result, truth, plain, floor=floor)
    return results


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_close(actual, expected) -> None:
    """As near as two orders of adding up are in fp32; how often keys are split depends on room."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
