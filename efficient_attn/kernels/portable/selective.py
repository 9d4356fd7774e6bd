"""Attention to a cache with selected values in ATen: all scores, and then only the rows they name.

Scores of all keys are held, but of values no more than some of the selected rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.kernels.conventions import accumulator, tokens_major

_ROWS_TOGETHER = 512


def decode(
    query, key_cache, value_cache, cache_lengths, block_table, q_to_k, q_to_v,
    window_left, scale, softcap, top_values, dropped_mass,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The ``selective_decode`` op."""
    batch, heads, tokens, _ = query.shape
    k_heads = _written_out(q_to_k, batch, heads, key_cache)
    v_heads = _written_out(q_to_v, batch, heads, value_cache)
    scores = _scores(query, key_cache, cache_lengths, block_table, k_heads, scale)
    if softcap > 0:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.masked_fill_(~_visible(scores, cache_lengths, window_left), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    if top_values is None:
        selected = _heaviest(scores, lse, 1 - dropped_mass)
    else:
        selected = _largest(scores, min(top_values, scores.shape[-1]))

    kept = torch.zeros_like(lse)
    out = lse.new_zeros(batch, heads, tokens, value_cache.shape[-1])
    for some in selected.split(_ROWS_TOGETHER, dim=-1):
        is_there = some < scores.shape[-1]
        some = some.where(is_there, 0)
        weights = torch.exp(scores.gather(-1, some) - lse.unsqueeze(-1)).where(is_there, 0)
        rows = _rows(value_cache, block_table, v_heads, some).to(out.dtype)
        rows = rows.masked_fill(~is_there.unsqueeze(-1), 0)
        kept += weights.sum(-1)
        out += torch.einsum("bhik,bhikd->bhid", weights, rows)
    blind = lse == -torch.inf
    out = (out / kept.unsqueeze(-1)).masked_fill(blind.unsqueeze(-1), 0)
    return tokens_major(out.to(query.dtype)), lse, kept.masked_fill(blind, 1)


def _scores(
    query: Tensor,
    key_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    k_heads: Tensor,
    scale: float,
) -> Tensor:
    """``(B, Hq, Nq, tokens)``, in the precision of sums; ``-inf`` behind the longest length."""
    batch, heads, tokens, _ = query.shape
    capacity = key_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    # Where lengths can be read, what lies behind them is left alone.
    ends = lengths.tolist() if lengths.device.type == "cpu" else [capacity] * batch
    dtype = accumulator(query.dtype)
    scores = query.new_full((batch, heads, tokens, max(ends, default=0)), -torch.inf, dtype=dtype)
    for b, end in enumerate(ends):
        for head in range(key_cache.shape[1]):
            readers = (k_heads[b] == head).nonzero().squeeze(-1)
            if readers.numel() == 0 or end == 0:
                continue
            if block_table is None:
                keys = key_cache[b, head, :end]
            else:
                pages = block_table[b, : -(-end // key_cache.shape[2])].long()
                keys = key_cache[pages.clamp(0, len(key_cache) - 1), head].flatten(0, 1)[:end]
            products = query[b, readers].to(dtype) @ keys.to(dtype).T
            scores[b, readers, :, :end] = products * scale
    return scores


def _visible(scores: Tensor, lengths: Tensor, window_left: int | None) -> Tensor:
    tokens, end = scores.shape[-2:]
    queries = torch.arange(tokens, device=scores.device).unsqueeze(-1)
    places = queries + (lengths - tokens).view(-1, 1, 1, 1)
    keys = torch.arange(end, device=scores.device)
    mask = keys <= places
    return mask if window_left is None else mask & (keys >= places - window_left)


def _largest(scores: Tensor, count: int) -> Tensor:
    """The keys of the largest scores in ascending order, and behind them the number of keys.

    Of equal scores the first ones win, which ``topk`` does not promise.
    """
    if count == 0:
        return scores.new_zeros((*scores.shape[:-1], 0), dtype=torch.int64)
    last = scores.topk(count).values[..., -1:]
    above, level = scores > last, scores == last
    room = count - above.sum(-1, keepdim=True)
    selected = (above | (level & (level.cumsum(-1) <= room))) & (scores != -torch.inf)
    ranks = torch.arange(1, count + 1, device=scores.device)
    shape = (*scores.shape[:-1], count)
    return torch.searchsorted(selected.cumsum(-1), ranks.expand(shape).contiguous())


def _heaviest(scores: Tensor, lse: Tensor, mass: float) -> Tensor:
    """The fewest keys that weigh so much, best first, and behind them the number of keys."""
    scores, keys = scores.sort(dim=-1, descending=True, stable=True)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    selected = (weights.cumsum(-1) - weights < mass) & (scores != -torch.inf)
    count = int(selected.sum(-1).max()) if selected.numel() else 0
    return keys.where(selected, scores.shape[-1])[..., :count]


def _rows(cache: Tensor, block_table: Tensor | None, heads: Tensor, tokens: Tensor) -> Tensor:
    """Rows of a cache by sequence and token: ``(B, Hq, Nq, n, D)`` of tokens ``(B, Hq, Nq, n)``."""
    sequences = torch.arange(len(tokens), device=tokens.device).view(-1, 1, 1, 1)
    heads = heads.view(*heads.shape, 1, 1)
    if block_table is None:
        return cache[sequences, heads, tokens]
    size = cache.shape[2]
    # A sequence of no tokens selects none, and its table may name no page.
    pages = block_table[sequences, tokens // size].long().clamp(0, len(cache) - 1)
    return cache[pages, heads, tokens % size]


def _written_out(index: Tensor | None, batch: int, heads: int, cache: Tensor) -> Tensor:
    """The head that each query head reads, ``(B, Hq)``."""
    if index is None:
        index = torch.arange(heads, device=cache.device) // (heads // cache.shape[1])
    return index.long().expand(batch, heads)
