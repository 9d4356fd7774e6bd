"""Exact attention over packed sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.functional import _contract as contract
from efficient_attn.head_map import HeadMap
from efficient_attn.masking import Window, window_limits


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    head_map: HeadMap | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` of each sequence to itself, all sequences packed end to end.

    Args:
        query: Packed queries.
        key: Packed keys.
        value: Packed values.
        cu_seqlens_q: Where each sequence's queries start, and where the last one ends.
        cu_seqlens_k: The same for keys and values.
        max_seqlen_q: The longest query sequence, or any upper bound.
        max_seqlen_k: The longest key sequence, or any upper bound.
        head_map: As in :func:`attention`; a map may have one row per sequence.
        causal: As in :func:`attention`, aligned to each sequence's own lower right corner.
        window: As in :func:`attention`.
        scale: As in :func:`attention`.
        softcap: As in :func:`attention`.
        return_lse: Return the log-sum-exp of the scores too.

    Returns:
        ``out``, or ``(out, lse)``.

    Shape:
        - query: ``(T, Hq, D)``; key: ``(S, Hk, D)``; value: ``(S, Hv, Dv)``
        - cu_seqlens_q, cu_seqlens_k: ``(sequences + 1,)``, int32 or int64
        - out: ``(T, Hq, Dv)``; lse: ``(T, Hq)``, natural logarithm

    Raises:
        ValueError: A shape, the packing or the head map does not fit.
        TypeError: A dtype or a kind does not fit.
        UnsupportedError: The input is valid, but no kernel on its device can honour it.
    """
    contract.check_tensors(query, key, value, ("tokens", "heads", "dim"))
    contract.check_packing("cu_seqlens_q", cu_seqlens_q, query)
    contract.check_packing("cu_seqlens_k", cu_seqlens_k, key)
    sequences = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] - 1 != sequences:
        raise ValueError(
            f"cu_seqlens_q names {sequences} sequences and cu_seqlens_k "
            f"{cu_seqlens_k.shape[0] - 1}; they must name the same."
        )
    contract.check_longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    contract.check_longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    maps = contract.resolve_map(head_map, query, key, value, heads=1, rows=sequences)
    out, lse = torch.ops.efficient_attn.attention_varlen(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        *maps,
        *window_limits(causal, window),
        contract.resolve_scale(scale, query),
        contract.check_softcap(softcap),
    )
    return (out, lse) if return_lse else out
