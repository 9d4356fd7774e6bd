"""Merging attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge partial results by their log-sum-exp.

    ``lse = log(sum_s exp(lse_s))`` and ``out = sum_s exp(lse_s - lse) out_s``. A part that saw
    nothing (``lse_s = -inf``) does not count, and a row in which no part saw anything stays zero
    with ``lse = -inf``.

    Shape:
        - outs: parts of shape ``(..., D)``; lses: parts of shape ``(...)``
        - out: ``(..., D)``; lse: ``(...)``
    """
    all_lse = torch.stack(list(lses))
    lse = torch.logsumexp(all_lse, dim=0)
    weight = torch.exp(all_lse - lse.masked_fill(lse == -torch.inf, 0.0))
    out = sum(w.unsqueeze(-1) * part for w, part in zip(weight, outs, strict=True))
    return out, lse
