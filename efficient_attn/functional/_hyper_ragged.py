"""HyperAttention where lengths differ: every sample, or sequence, is a call of its own.

So each has the plan, and the result, that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from efficient_attn.head_map import HeadMap


def each_sample(
    attend: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor,
    head_map: HeadMap | None,
    return_error: bool,
    **options: object,
) -> tuple[Tensor, ...]:
    """Keys and values of each sample cut to their length: ``(out, lse, error | None)``."""
    options |= {"return_lse": True, "return_error": return_error}
    samples = []
    for i, length in enumerate(key_lengths.tolist()):
        k, v = (x[i : i + 1, :, :length] for x in (key, value))
        parts = [query[i : i + 1]]
        if not options["causal"] and 0 < length < query.shape[2] == key.shape[2]:
            # Tokens among themselves: without the padding, each stands opposite its own key.
            parts = parts[0].split([length, query.shape[2] - length], dim=2)
        results = [attend(q, k, v, head_map=_row(head_map, i), **options) for q in parts]
        samples.append([torch.cat(x, dim=2) for x in zip(*results, strict=True)])
    out, lse, *error = (torch.cat(x) for x in zip(*samples, strict=True))
    return (out, lse, *error, None)[:3]


def each_sequence(
    attend: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_map: HeadMap | None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """Packed sequences, each attending to itself: ``(out, lse)``, packed."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if len(ends_q) == 1:
        out = query.new_zeros(0, query.shape[1], value.shape[-1])
        return out, query.new_zeros(0, query.shape[1]).float()
    results = []
    for i in range(len(ends_q) - 1):
        q = query[ends_q[i] : ends_q[i + 1]]
        k, v = (x[ends_k[i] : ends_k[i + 1]] for x in (key, value))
        sequence = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        results.append(attend(*sequence, head_map=_row(head_map, i), return_lse=True, **options))
    return tuple(
        torch.cat([x[0].transpose(0, 1) for x in part]) for part in zip(*results, strict=True)
    )


def _row(head_map: HeadMap | None, sample: int) -> HeadMap | None:
    """The map of one sample, where there is one row per sample."""
    if head_map is None:
        return None
    maps = (head_map.q_to_k, head_map.q_to_v)
    k, v = (x[sample] if x is not None and x.dim() == 2 else x for x in maps)
    return HeadMap(head_map.num_q_heads, head_map.num_k_heads, head_map.num_v_heads, k, v)
