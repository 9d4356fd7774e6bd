"""Attention as the equations state it, for any head map and in any precision.

This is the specification: every other implementation is tested against it. It holds the whole
score matrix in memory and is differentiated by autograd.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from efficient_attn.head_map import HeadMap
from efficient_attn.masking import Window, visible, window_limits


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    head_map: HeadMap | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, ``out = softmax(scale * q k^T + bias) v`` over the visible keys.

    Arguments are those of :func:`efficient_attn.attention`.

    Shape:
        - query: ``(B, Hq, Nq, D)``; key: ``(B, Hk, Nk, D)``; value: ``(B, Hv, Nk, Dv)``
        - out: ``(B, Hq, Nq, Dv)``; lse: ``(B, Hq, Nq)``, natural log
    """
    if key_lengths is not None:
        samples = [
            attention(
                query[b : b + 1],
                key[b : b + 1, :, :length],
                value[b : b + 1, :, :length],
                head_map=None if head_map is None else row_of_map(head_map, b),
                causal=causal,
                window=window,
                scale=scale,
                softcap=softcap,
                bias=None if bias is None else _sample_bias(bias, b, key.shape[2])[..., :length],
            )
            for b, length in enumerate(key_lengths.tolist())
        ]
        outs, lses = zip(*samples, strict=True)
        return torch.cat(outs), torch.cat(lses)

    if head_map is None:
        head_map = HeadMap(query.shape[1], key.shape[1], value.shape[1])
    key = expand_heads(key, head_map.key_index(key.device))
    value = expand_heads(value, head_map.value_index(value.device))
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    score = scale * torch.einsum("bhid,bhjd->bhij", query, key)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    if bias is not None:
        score = score + bias
    mask = visible(query.shape[2], key.shape[2], *window_limits(causal, window), score.device)
    score = score.masked_fill(~mask, -torch.inf)

    # A row that sees nothing is computed on zeros, which keeps gradients finite, then put right.
    blind = (score == -torch.inf).all(dim=-1, keepdim=True)
    score = score.masked_fill(blind, 0.0)
    lse = torch.logsumexp(score, dim=-1, keepdim=True)
    weight = torch.exp(score - lse).masked_fill(blind, 0.0)
    lse = lse.masked_fill(blind, -torch.inf).squeeze(-1)
    return torch.einsum("bhij,bhjd->bhid", weight, value), lse


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_map: HeadMap | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """Packed sequences, one dense call each.

    Shape:
        - query: ``(T, Hq, D)``; key: ``(S, Hk, D)``; value: ``(S, Hv, Dv)``
        - cu_seqlens_q, cu_seqlens_k: ``(sequences + 1,)``, ascending from 0 to T and to S
        - out: ``(T, Hq, Dv)``; lse: ``(T, Hq)``
    """
    outs, lses = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        q = query[starts_q[i] : starts_q[i + 1]]
        k, v = (x[starts_k[i] : starts_k[i + 1]] for x in (key, value))
        out, lse = attention(
            *(rearrange(x, "n h d -> 1 h n d") for x in (q, k, v)),
            head_map=None if head_map is None else row_of_map(head_map, i),
            **options,
        )
        outs.append(rearrange(out, "1 h n d -> n h d"))
        lses.append(rearrange(lse, "1 h n -> n h"))
    return torch.cat(outs), torch.cat(lses)


def expand_heads(x: Tensor, index: Tensor) -> Tensor:
    """Write ``x`` of shape ``(B, G, N, D)`` out to the heads named by ``(H,)`` or ``(B, H)``."""
    if index.dim() == 1:
        return x.index_select(1, index)
    return torch.stack([sample.index_select(0, row) for sample, row in zip(x, index, strict=True)])


def row_of_map(head_map: HeadMap, sample: int) -> HeadMap:
    """The map of one sample, where there is one row per sample."""
    k, v = (
        x[sample] if x is not None and x.dim() == 2 else x
        for x in (head_map.q_to_k, head_map.q_to_v)
    )
    return HeadMap(head_map.num_q_heads, head_map.num_k_heads, head_map.num_v_heads, k, v)


def _sample_bias(bias: Tensor, sample: int, nk: int) -> Tensor:
    """The bias of one sample with its key dimension written out, so that it can be sliced."""
    bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    bias = bias[sample : sample + 1] if bias.shape[0] > 1 else bias
    return bias.expand(*bias.shape[:-1], nk)
