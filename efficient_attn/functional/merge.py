"""Merging attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge partial attention results by their log-sum-exp, exactly.

    Attention over a set of keys is the merge of attention over any parts of it. Differentiable in
    every argument.

    Args:
        outs: What each part computed, all of one shape and dtype.
        lses: The log-sum-exp that each part returned beside it.

    Returns:
        ``(out, lse)`` over the keys of all parts.

    Shape:
        - outs: each ``(..., D)``; lses: each ``(...)``
        - out: ``(..., D)``; lse: ``(...)``

    Raises:
        ValueError: No parts, or parts whose shapes do not match.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"got {len(outs)} outs and {len(lses)} lses; pass at least one part, and one lse for "
            "every out."
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"part {i} has out {tuple(out.shape)} and lse {tuple(lse.shape)}; every out must "
                f"be {tuple(outs[0].shape)} and every lse {tuple(outs[0].shape[:-1])}."
            )
    return torch.ops.efficient_attn.merge_states(outs, lses)
