"""Attention to a cache that reads the values of the largest weights alone, as the paper states it.

Source: Lin et al., Sigma, arXiv 2501.13629, section 2.3 (selective value loading). What the paper
leaves open is settled here: keys are selected for each query head and token, and ties go to the
earliest key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.head_map import HeadMap
from efficient_attn.masking import Window, visible, window_limits
from efficient_attn.reference.attention import expand_heads, row_of_map
from efficient_attn.reference.decode import cached_rows


def selective_decode(
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
    value_weights: str = "paper",
    value_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`efficient_attn.attention_decode` with selected values.

    Shape:
        - query: ``(B, Hq, Nq, D)``; key_cache, value_cache: dense or paged
        - value_mean: ``(B, Hv, Dv)``
        - out: ``(B, Hq, Nq, Dv)``; lse, dropped_mass: ``(B, Hq, Nq)``
    """
    if head_map is None:
        head_map = HeadMap(query.shape[1], key_cache.shape[1], value_cache.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    results = []
    for b, length in enumerate(cache_lengths.tolist()):
        row = row_of_map(head_map, b)
        k_heads, v_heads = (x.to(query.device) for x in (row.key_index(), row.value_index()))
        keys, values = (cached_rows(x, b, length, block_table) for x in (key_cache, value_cache))
        score = scale * torch.einsum("hid,hjd->hij", query[b], expand_heads(keys, k_heads)[0])
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        mask = visible(query.shape[2], length, *window_limits(True, window), score.device)
        score = score.masked_fill(~mask, -torch.inf)
        # All keys weigh in the softmax, as if no value were left out.
        lse = torch.logsumexp(score, dim=-1)
        weight = torch.exp(score - lse.unsqueeze(-1)).masked_fill(score == -torch.inf, 0.0)

        order = score.argsort(dim=-1, descending=True, stable=True)
        score, weight = score.gather(-1, order), weight.gather(-1, order)
        if top_values is not None:
            selected = torch.arange(length, device=score.device).expand_as(score) < top_values
        else:
            selected = weight.cumsum(-1) - weight < 1 - max_dropped_mass
        selected = selected & (score != -torch.inf)
        dropped = weight.masked_fill(selected, 0.0).sum(-1)
        weight = weight.masked_fill(~selected, 0.0)
        if value_weights == "renormalised":
            total = weight.sum(-1, keepdim=True)
            weight = weight / total.masked_fill(total == 0, 1.0)
        rows = values[0][v_heads.view(-1, 1, 1), order].masked_fill(~selected.unsqueeze(-1), 0.0)
        out = torch.einsum("hij,hijd->hid", weight, rows)
        if value_weights == "mean":
            mean = value_mean[b, v_heads].to(out.dtype)
            out = out + dropped.unsqueeze(-1) * mean.unsqueeze(1)
        results.append((out, lse, dropped))
    return tuple(map(torch.stack, zip(*results, strict=True)))
