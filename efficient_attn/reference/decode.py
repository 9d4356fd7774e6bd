"""Attention of a few new tokens to a cache, as the equations state it.

Sequence by sequence: its cached rows are looked up, and it attends to them causally.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.head_map import HeadMap
from efficient_attn.masking import Window
from efficient_attn.reference.attention import attention, row_of_map


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_lengths: Tensor,
    block_table: Tensor | None = None,
    head_map: HeadMap | None = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of each sequence's last tokens to its cached keys and values.

    Arguments are those of :func:`efficient_attn.attention_decode`.

    Shape:
        - query: ``(B, Hq, Nq, D)``
        - key_cache: ``(B, Hk, S, D)``, or ``(pages, Hk, page_size, D)`` with a block table
        - value_cache: the same with ``Hv`` heads of width ``Dv``
        - out: ``(B, Hq, Nq, Dv)``; lse: ``(B, Hq, Nq)``
    """
    if head_map is None:
        head_map = HeadMap(query.shape[1], key_cache.shape[1], value_cache.shape[1])
    sequences = [
        attention(
            query[b : b + 1],
            *(cached_rows(x, b, length, block_table) for x in (key_cache, value_cache)),
            head_map=row_of_map(head_map, b),
            causal=True,
            window=window,
            scale=scale,
            softcap=softcap,
        )
        for b, length in enumerate(cache_lengths.tolist())
    ]
    outs, lses = zip(*sequences, strict=True)
    return torch.cat(outs), torch.cat(lses)


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    *,
    cache_lengths: Tensor,
    block_table: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Multi-head latent attention in its absorbed form: one key head for all query heads.

    A cached row holds the latent and the rotary key; as a value, its latent part alone counts.
    Arguments are those of :func:`efficient_attn.mla_decode`.

    Shape:
        - q_latent: ``(B, H, Nq, r)``; q_rope: ``(B, H, Nq, dr)``
        - cache: ``(B, S, r + dr)``, or ``(pages, page_size, r + dr)`` with a block table
        - out: ``(B, H, Nq, r)``, still latent; lse: ``(B, H, Nq)``
    """
    one_head = cache.unsqueeze(1)
    return attention_decode(
        torch.cat([q_latent, q_rope], dim=-1),
        one_head,
        one_head[..., : q_latent.shape[-1]],
        cache_lengths=cache_lengths,
        block_table=block_table,
        scale=scale,
    )


def cached_rows(cache: Tensor, sequence: int, length: int, block_table: Tensor | None) -> Tensor:
    """The rows that one sequence has in a cache, ``(1, H, length, D)``."""
    if block_table is None:
        return cache[sequence : sequence + 1, :, :length]
    page_size = cache.shape[2]
    pages = block_table[sequence, : -(-length // page_size)]
    rows = cache[pages.long()].transpose(0, 1).flatten(1, 2)
    return rows[None, :, :length]
