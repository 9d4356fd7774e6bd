"""Output projections fitted anew to what converted heads bring them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_attn.convert.attending import grouped_attention, in_fp32, latent_heads
from efficient_attn.convert.attention_weights import (
    GroupedAttentionWeights,
    LatentAttentionWeights,
)

# Share of the mean variance of heads that is added to every variance.
DAMPING = 1e-3


def refit_output(
    converted: LatentAttentionWeights,
    source: GroupedAttentionWeights,
    inputs: Iterable[Tensor],
    *,
    bias: bool = True,
    damping: float = DAMPING,
    device: torch.device | str = "cpu",
) -> LatentAttentionWeights:
    """The layer with the output projection that brings it nearest to its source.

    A ridge regression of the source's outputs on the converted heads, which draws to the present
    projection. Other errors of heads are right already to first order; what this wins is of higher
    order: attention itself has changed, and its heads err alike.

    Args:
        converted: The layer.
        source: What it was converted from.
        inputs: Batches ``(B, N, D)`` of what enters it.
        bias: Whether the output may have a bias.
        damping: Share of the mean variance that is added to every variance.
        device: Where the inputs are.
    """
    ours, theirs = in_fp32(converted, device), in_fp32(source, device)
    width, out = converted.output.shape[1] + 1, converted.output.shape[0]
    options = {"dtype": torch.float64, "device": device}
    inner, cross = torch.zeros(width, width, **options), torch.zeros(out, width, **options)
    for batch in inputs:
        for row in batch:
            heads = F.pad(latent_heads(ours, row), (0, 1), value=float(bias)).double()
            inner += heads.mT @ heads
            cross += grouped_attention(theirs, row).double().mT @ heads
    inner, cross = inner.cpu(), cross.cpu()
    present = torch.zeros(out, width, dtype=torch.float64)
    present[:, :-1] = converted.output
    if converted.output_bias is not None:
        present[:, -1] = converted.output_bias
    size = inner.diagonal()[:-1].mean()
    damped = inner + damping * size * torch.eye(width, dtype=torch.float64)
    fitted = present + torch.linalg.solve(damped, cross - present @ inner, left=False)
    kept = bias or converted.output_bias is not None
    return replace(converted, output=fitted[:, :-1], output_bias=fitted[:, -1] if kept else None)
