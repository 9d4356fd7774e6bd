"""Attention of new tokens to a cache: grouped heads, and multi-head latent attention."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.functional import _cache_contract as cache_contract
from efficient_attn.functional import _contract as contract
from efficient_attn.functional._selection import (
    ValueWeights,
    check_selection,
    selective_decode,
)
from efficient_attn.head_map import HeadMap
from efficient_attn.masking import Window, window_limits

# Up to here, reading the cache is what costs time; more new tokens are a prefill, for attention.
FEW_TOKENS = 16


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
    top_values: int | None = None,
    max_dropped_mass: float | None = None,
    value_weights: ValueWeights = "paper",
    value_mean: Tensor | None = None,
    return_lse: bool = False,
    return_dropped_mass: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attend from each sequence's last tokens to all that it has cached, theirs included.

    Causal: the last of the ``Nq`` queries sees every cached token of its sequence, the one before
    it all but the last, and so on. Each cached row is read once for all query heads that read its
    head; heads that nobody reads are not read, nor is anything behind a sequence's length. For
    inference: it has no gradient.

    With ``top_values`` or ``max_dropped_mass`` each query head and token reads the values of its
    largest scores alone, ties going to the earliest key; the softmax is that of all visible keys.
    Values that no query selects are not read, so they may lie elsewhere or hold NaN. The mass
    ``tau`` of what is dropped, exact and returned on request, bounds the error: the output moves by
    no more than ``tau * max |v|`` (with ``"renormalised"`` weights, by ``tau`` times the largest
    distance of two values). Selecting every key is attention as it is without.

    Source of the selection: Lin et al., Sigma, arXiv 2501.13629, section 2.3; of the mean: Ribar et
    al., SparQ Attention, arXiv 2312.04985.

    Args:
        query: Queries of the newest tokens, a few per sequence. Any strides, here and below.
        key_cache: Keys, those of the newest tokens included.
        value_cache: Values.
        cache_lengths: Number of cached tokens of each sequence, the newest included.
        block_table: The page that holds each block of a sequence, for a paged cache: token ``t``
            is row ``t % page_size`` of page ``block_table[b, t // page_size]``. Entries that no
            token needs may hold anything.
        head_map: Which key and value head each query head reads; by default even groups.
        window: ``(left, right)``: a token sees the ``left`` tokens before it; ``right`` has no
            effect, since nothing later is seen.
        scale: Factor on the scores; by default ``D ** -0.5``.
        softcap: If positive, scores become ``softcap * tanh(score / softcap)``.
        top_values: Read so many values for each query head and token, or all that it sees.
        max_dropped_mass: Instead, the fewest that leave out no more than this share of the weight,
            at least 0 and below 1.
        value_weights: ``"paper"``: the weights of the full softmax. ``"renormalised"``: divided by
            their sum. ``"mean"``: those of the paper, and ``value_mean`` with the weight of all
            that was dropped.
        value_mean: The mean of each sequence's values, for ``"mean"``. It is yours to keep, since
            it cannot be found without reading all of them.
        return_lse: Return the log-sum-exp of the scores of all visible keys too.
        return_dropped_mass: Return the share of the weight that the dropped keys have.

    Returns:
        ``out``, or a tuple of it and ``lse`` and ``dropped_mass``, as asked for. A query that sees
        no key gives zeros, ``lse = -inf`` and a dropped mass of 0.

    Shape:
        - query: ``(B, Hq, Nq, D)``
        - key_cache: ``(B, Hk, S, D)``; with a block table, ``(pages, Hk, page_size, D)``
        - value_cache: ``(B, Hv, S, Dv)``; with a block table, ``(pages, Hv, page_size, Dv)``
        - cache_lengths: ``(B,)``, int32 or int64; block_table: ``(B, blocks)``, the same
        - value_mean: ``(B, Hv, Dv)``
        - out: ``(B, Hq, Nq, Dv)``, stored so that merging the heads is a view
        - lse, dropped_mass: ``(B, Hq, Nq)``, natural logarithm, fp32 (fp64 for fp64 inputs)

    Raises:
        ValueError: A shape, a length, a page, the head map or the selection does not fit.
        TypeError: A dtype or a kind does not fit.
        UnsupportedError: The input is valid, but no kernel on its device can honour it; or a
            gradient is asked for.
    """
    paged = block_table is not None
    cache_contract.check_cache(query, key_cache, value_cache, paged)
    cache_contract.check_cached_tokens(cache_lengths, block_table, query, key_cache)
    maps = contract.resolve_map(
        head_map, query, key_cache, value_cache, heads=1, rows=query.shape[0]
    )
    left, _ = window_limits(True, window)
    arguments = (
        query,
        key_cache,
        value_cache,
        cache_lengths,
        block_table,
        *maps,
        left,
        contract.resolve_scale(scale, query),
        contract.check_softcap(softcap),
    )
    batch, heads, _, dim = query.shape[0], *value_cache.shape[1:]
    if check_selection(
        top_values,
        max_dropped_mass,
        value_weights,
        value_mean,
        return_dropped_mass,
        (batch, heads, dim),
    ):
        selection = (top_values, max_dropped_mass, value_weights, value_mean)
        out, lse, kept_mass = selective_decode(arguments, *selection)
    else:
        out, lse = torch.ops.efficient_attn.attention_decode(*arguments)
    results = (out,)
    if return_lse:
        results += (lse,)
    if return_dropped_mass:
        results += ((1 - kept_mass).clamp(min=0),)
    return results if len(results) > 1 else out


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    *,
    cache_lengths: Tensor,
    block_table: Tensor | None = None,
    scale: float,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention_decode` of multi-head latent attention, in its absorbed form.

    All query heads read one cached row per token, ``[latent, rotary key]``, and its latent part is
    the value too. The row is read once. The caller multiplies queries with the key up-projection
    before the call, and the latent output with the value up-projection after it.

    Source: DeepSeek-AI, DeepSeek-V2, section 2.1 and appendix C.

    Args:
        q_latent: Queries in the space of the latent.
        q_rope: Rotary queries; width 0 for none.
        cache: Cached rows.
        cache_lengths: As in :func:`attention_decode`.
        block_table: As in :func:`attention_decode`.
        scale: Factor on the scores: that of the heads before they were absorbed, usually
            ``(qk_nope_head_dim + qk_rope_head_dim) ** -0.5``.
        return_lse: Return the log-sum-exp of the scores too.

    Returns:
        ``out``, or ``(out, lse)``, as in :func:`attention_decode`.

    Shape:
        - q_latent: ``(B, H, Nq, kv_lora_rank)``; q_rope: ``(B, H, Nq, qk_rope_head_dim)``
        - cache: ``(B, S, kv_lora_rank + qk_rope_head_dim)``; with a block table,
          ``(pages, page_size, kv_lora_rank + qk_rope_head_dim)``
        - out: ``(B, H, Nq, kv_lora_rank)``; lse: ``(B, H, Nq)``

    Raises:
        ValueError: A shape, a length or a page does not fit.
        TypeError: A dtype or a kind does not fit.
        UnsupportedError: No kernel on its device can honour the input, or a gradient is asked for.
    """
    cache_contract.check_latent_cache(q_latent, q_rope, cache, block_table is not None)
    cache_contract.check_cached_tokens(cache_lengths, block_table, q_latent, cache)
    out, lse = torch.ops.efficient_attn.mla_decode(
        q_latent, q_rope, cache, cache_lengths, block_table, float(scale)
    )
    return (out, lse) if return_lse else out
