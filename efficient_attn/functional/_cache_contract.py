"""The contract of calls that attend to a cache; what they share with others is in _contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.functional import _contract as contract
from efficient_attn.head_map import is_readable


def check_cache(query: Tensor, key_cache: Tensor, value_cache: Tensor, paged: bool) -> None:
    """Queries and a key and value cache, dense or paged, that fit together."""
    layout = ("pages" if paged else "batch", "heads", "tokens", "dim")
    names = ("query", "key_cache", "value_cache")
    contract.check_tensors(query, key_cache, value_cache, layout, names)
    if not query.dtype == key_cache.dtype == value_cache.dtype:
        raise TypeError(
            f"query, key_cache and value_cache have dtypes {query.dtype}, {key_cache.dtype} and "
            f"{value_cache.dtype}; pass query.to(key_cache.dtype), and keep both caches in one "
            "dtype. A cache is never cast, not even by autocast, for that would copy it."
        )
    if paged and key_cache.shape[0] != value_cache.shape[0]:
        raise ValueError(
            f"key_cache has {key_cache.shape[0]} pages and value_cache {value_cache.shape[0]}; one "
            "block table serves both."
        )


def check_latent_cache(q_latent: Tensor, q_rope: Tensor, cache: Tensor, paged: bool) -> None:
    """Latent queries and a cache whose rows are as wide as both of their parts together."""
    for name, x, dims in (
        ("q_latent", q_latent, "(batch, heads, tokens, kv_lora_rank)"),
        ("q_rope", q_rope, "(batch, heads, tokens, qk_rope_head_dim)"),
        ("cache", cache, f"({'pages' if paged else 'batch'}, tokens, width)"),
    ):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; pass a torch.Tensor.")
        if x.dim() != dims.count(",") + 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {dims}.")
    if q_latent.shape[:-1] != q_rope.shape[:-1]:
        raise ValueError(
            f"q_latent has shape {tuple(q_latent.shape)} and q_rope {tuple(q_rope.shape)}; they "
            "must agree in all but the last dimension."
        )
    rank, rope = q_latent.shape[-1], q_rope.shape[-1]
    if cache.shape[-1] != rank + rope:
        raise ValueError(
            f"rows of cache are {cache.shape[-1]} wide; with kv_lora_rank {rank} and "
            f"qk_rope_head_dim {rope} they must be {rank + rope}."
        )
    for name, x in (("q_rope", q_rope), ("cache", cache)):
        if (x.dtype, x.device) != (q_latent.dtype, q_latent.device):
            raise TypeError(
                f"{name} is {x.dtype} on {x.device} and q_latent {q_latent.dtype} on "
                f"{q_latent.device}; all three must be of one dtype and on one device."
            )
    if q_latent.dtype not in contract.DTYPES:
        raise TypeError(
            f"q_latent has dtype {q_latent.dtype}; pass float16, bfloat16, float32 or float64."
        )
    if rank == 0:
        raise ValueError("q_latent has kv_lora_rank 0; it must be at least 1.")
    if not paged and cache.shape[0] != q_latent.shape[0]:
        raise ValueError(
            f"cache has batch size {cache.shape[0]} and q_latent {q_latent.shape[0]}; they must be "
            "equal."
        )


def check_cached_tokens(
    cache_lengths: Tensor, block_table: Tensor | None, query: Tensor, cache: Tensor
) -> None:
    """One length per sequence, within what the cache or the block table can hold."""
    batch = query.shape[0]
    contract.check_integers("cache_lengths", cache_lengths, cache)
    if cache_lengths.shape != (batch,):
        raise ValueError(
            f"cache_lengths has shape {tuple(cache_lengths.shape)}; it must be ({batch},), one "
            "length per sequence."
        )
    pages, page_size = cache.shape[0], cache.shape[-2]
    capacity = page_size
    if block_table is not None:
        contract.check_integers("block_table", block_table, cache)
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"block_table has shape {tuple(block_table.shape)}; it must be ({batch}, blocks), "
                "one row per sequence."
            )
        capacity = block_table.shape[1] * page_size
    if not is_readable(cache_lengths) or batch == 0:
        return
    lengths = cache_lengths.tolist()  # In Python: a tensor op takes longer than a few integers.
    low, high = min(lengths), max(lengths)
    if low < 0 or high > capacity:
        raise ValueError(
            f"cache_lengths ranges from {low} to {high}; every length must lie in [0, {capacity}], "
            "what the cache has room for."
        )
    if block_table is not None and is_readable(block_table):
        _check_pages(cache_lengths, block_table, pages, page_size)


def _check_pages(cache_lengths: Tensor, block_table: Tensor, pages: int, page_size: int) -> None:
    if block_table.numel() == 0:
        return
    low, high = (int(x) for x in block_table.aminmax())
    if low >= 0 and high < pages:
        return  # Nearly always, and sooner seen than which entries are needed.
    blocks = torch.arange(block_table.shape[1])
    needed = blocks * page_size < cache_lengths.unsqueeze(1)
    wrong = needed & ((block_table < 0) | (block_table >= pages))
    if wrong.any():
        sequence, block = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"block_table[{sequence}, {block}] is {int(block_table[sequence, block])}; a block "
            f"that cache_lengths reaches must name a page in [0, {pages})."
        )
