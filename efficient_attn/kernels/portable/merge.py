"""Merging partial attention results, in ATen."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The ``merge_states`` op; sums in the precision of the log-sum-exps, in the order given."""
    lse = torch.stack(lses).logsumexp(0)
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    total = torch.zeros(outs[0].shape, dtype=lse.dtype, device=lse.device)
    for part, part_lse in zip(outs, lses, strict=True):
        total.addcmul_(part.to(lse.dtype), torch.exp(part_lse - finite_lse).unsqueeze(-1))
    return total.to(outs[0].dtype), lse
