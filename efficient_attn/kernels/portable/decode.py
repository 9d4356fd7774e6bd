"""Attention to a cache in ATen: the attention op over what is cached, with its lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.kernels.conventions import tokens_major
from efficient_attn.kernels.portable import attention


def decode(
    query, key_cache, value_cache, cache_lengths, block_table, q_to_k, q_to_v,
    window_left, scale, softcap,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ``attention_decode`` op."""
    key, value = (_rows(x, cache_lengths, block_table) for x in (key_cache, value_cache))
    groups = key.shape[1]
    plain = q_to_k is None and q_to_v is None and groups == value.shape[1] and window_left is None
    if query.shape[2] > 1 or not plain:
        options = (q_to_k, q_to_v, None, cache_lengths, window_left, 0, scale, softcap)
        return attention.forward(query, key, value, *options)
    # A single token sees all there is, so the heads of a group can be queries of one head.
    packed = query.unflatten(1, (groups, -1)).squeeze(3)
    options = (None, None, None, cache_lengths, None, None, scale, softcap)
    out, lse = attention.forward(packed, key, value, *options)
    return _one_token(out.flatten(1, 2)), lse.flatten(1, 2).unsqueeze(2)


def latent_decode(
    q_latent, q_rope, cache, cache_lengths, block_table, scale
) -> tuple[Tensor, Tensor]:
    """The ``mla_decode`` op."""
    query = torch.cat([q_latent, q_rope], dim=-1)
    # The whole row stands in for its latent part, so that nothing is cut out and copied.
    rows = cache.unsqueeze(1)
    options = (cache_lengths, block_table, None, None, None, scale, 0.0)
    out, lse = decode(query, rows, rows, *options)
    return tokens_major(out[..., : q_latent.shape[-1]]), lse


def _rows(cache: Tensor, lengths: Tensor, block_table: Tensor | None) -> Tensor:
    """Every sequence's rows in a row, ``(B, H, tokens, D)``; behind the lengths lies anything."""
    if block_table is None:
        return cache
    if lengths.device.type == "cpu" and lengths.numel():
        used = -(-int(lengths.max()) // cache.shape[2])
        block_table = block_table[:, :used]
    # Entries that no length reaches may name no page at all.
    pages = cache[block_table.long().clamp(0, cache.shape[0] - 1)]
    return pages.transpose(1, 2).flatten(2, 3)


def _one_token(x: Tensor) -> Tensor:
    """``(B, H, D)`` as ``(B, H, 1, D)``, stored with tokens before heads."""
    return x.contiguous().unsqueeze(1).transpose(1, 2)
