"""What the native CUDA kernels of attention to a cache cover; Triton's answer everything else.

They have been written for decoding: few query rows, which share what is read of the cache. The
limits on rows are reasoned, not measured: beyond them Triton's larger tiles read less.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)
# Head dims for which there are kernels, and query rows per key head, on average.
_HEAD_DIMS, _MOST_ROWS = (64, 128), 32
# Columns that are values, and all columns; query rows of a sequence.
_MOST_RANK, _MOST_WIDTH, _MOST_LATENT_ROWS = 512, 576, 64
# What the largest block asks for: all that compute capability 8.0 has.
_SHARED_MEMORY = 163 * 2**10


def attention_decode_covers(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    q_to_k: Tensor | None,
    q_to_v: Tensor | None,
    window_left: int | None,
    scale: float,
    softcap: float,
) -> bool:
    """Whether the kernel of ``attention_decode`` takes these arguments."""
    _, heads, tokens, dim = query.shape
    return (
        _are_half(query, key_cache, value_cache)
        and dim in _HEAD_DIMS
        and value_cache.shape[-1] in _HEAD_DIMS
        and window_left is None
        and softcap == 0.0
        and 0 < heads * tokens <= _MOST_ROWS * key_cache.shape[1]
        and _begin_at_multiples(4, query)
        and _begin_at_multiples(16, key_cache, value_cache)
        and _has_room(query.device)
    )


def mla_decode_covers(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    scale: float,
) -> bool:
    """Whether the kernel of ``mla_decode`` takes these arguments."""
    _, heads, tokens, rank = q_latent.shape
    width = cache.shape[-1]
    return (
        _are_half(q_latent, q_rope, cache)
        and rank % 8 == width % 8 == 0
        and rank <= _MOST_RANK
        and width <= _MOST_WIDTH
        and 0 < heads * tokens <= _MOST_LATENT_ROWS
        and _begin_at_multiples(4, q_latent, q_rope)
        and _begin_at_multiples(16, cache)
        and _has_room(cache.device)
    )


def _are_half(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    return dtype in _DTYPES and all(x.dtype == dtype for x in tensors)


@functools.lru_cache
def _has_room(device: torch.device) -> bool:
    """Whether a block finds its shared memory there, which small devices do not have."""
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= _SHARED_MEMORY


def _begin_at_multiples(size: int, *tensors: Tensor) -> bool:
    """Whether all rows do and their numbers lie side by side, to be read so many at a time."""
    return all(
        x.numel() == 0
        or x.stride(-1) == 1
        and x.data_ptr() % size == 0
        and all(step * x.itemsize % size == 0 for step in x.stride()[:-1])
        for x in tensors
    )


# Enough keys for several splits.
_TOKENS = 700


def attention_decode_sample(device: torch.device) -> tuple:
    """Pages, an uneven map and different widths; one sequence is empty."""
    index = torch.tensor([2, 0, 2, 2, 1], dtype=torch.int32, device=device)
    query, pages = _scattered(device, 1, 3, 5, 2, 128), 3 * -(-_TOKENS // 16)
    key = _scattered(device, 2, pages, 3, 16, 128)
    value = _scattered(device, 3, pages, 3, 16, 64)
    table = torch.arange(pages, device=device).flip(0).view(3, -1)
    return query, key, value, _lengths(device), table, index, index.flip(0), None, 1.0, 0.0


def mla_decode_sample(device: torch.device) -> tuple:
    """Latents of the usual width, without pages; one sequence is empty."""
    queries = _scattered(device, 1, 3, 17, 1, 576).split([512, 64], -1)
    return *queries, _scattered(device, 2, 3, _TOKENS, 576), _lengths(device), None, 0.5


def agrees(actual: Tensor, expected: Tensor) -> bool:
    """Up to the rounding of weights and of results to fp16."""
    same_shape = actual.shape == expected.shape
    return same_shape and torch.allclose(actual.float(), expected.float(), rtol=4e-3, atol=4e-3)


def _lengths(device: torch.device) -> Tensor:
    return torch.tensor([_TOKENS, 0, 21], dtype=torch.int32, device=device)


def _scattered(device: torch.device, seed: int, *shape: int) -> Tensor:
    """Numbers between -1 and 1, the same on every device, of which no two rows are alike."""
    count = torch.arange(torch.Size(shape).numel(), device=device)
    residues = (count * count * 31 + count * 40503 * seed) % 65521
    return (residues.to(torch.float64) / 32760 - 1).half().view(shape)
