"""An estimate whose samples may weigh only so much: what is exact and what is sampled, merged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from efficient_attn.planning import HyperPlan

# A long output is merged in so many pieces, so that there is never a third of its size.
_PIECES = 8


def estimate(
    query: Tensor, key: Tensor, value: Tensor, plan: HyperPlan, scale: float, limit: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and log-sum-exp, and the latter as it is without the limit on samples."""
    op = torch.ops.efficient_attn.hyper_attention
    if limit is None or not plan.is_sampled_by_leaf:
        out, lse = op(query, key, value, *plan, scale)
        return out, lse, lse
    exact, exact_lse = op(query, key, value, *plan.exact_part(), scale)
    sampled, sampled_lse = op(query, key, value, *plan.sampled_part(), scale)
    unlimited_lse = torch.logaddexp(exact_lse, sampled_lse).detach()
    sampled_lse = torch.minimum(sampled_lse, exact_lse + math.log(limit))
    return *_merged((exact, exact_lse), (sampled, sampled_lse)), unlimited_lse


def _merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two partial results merged; without gradients in the memory of the first, piece by piece."""
    merge = torch.ops.efficient_attn.merge_states
    if first[0].requires_grad:
        return merge(*map(list, zip(first, second, strict=True)))
    pieces = (x.tensor_split(_PIECES, dim=2) for x in (*first, *second))
    for out, lse, more, more_lse in zip(*pieces, strict=True):
        merged, merged_lse = merge([out, more], [lse, more_lse])
        out.copy_(merged)
        lse.copy_(merged_lse)
    return first
