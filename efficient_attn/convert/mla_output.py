"""Output projections fitted anew to what converted heads bring them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_attn.convert.activations import Activations
from efficient_attn.convert.attending import grouped_attention, in_fp32, latent_heads
from efficient_attn.convert.attention_weights import (
    GroupedAttentionWeights,
    LatentAttentionWeights,
)

# Share of the mean variance of heads that is added to every variance.
DAMPING = 1e-3


def refit_output(
    converted: LatentAttentionWeights,
    wanted: Iterable[tuple[Tensor, Tensor]],
    *,
    bias: bool = True,
    damping: float = DAMPING,
    device: torch.device | str = "cpu",
) -> LatentAttentionWeights:
    """The layer with the output projection that brings it nearest to what is wanted of it.

    A ridge regression on the converted heads, which draws to the present projection. To first order
    they are read as they should be already; but attention itself has changed, and their errors go
    together.

    Args:
        converted: The layer.
        wanted: Batches ``(B, N, D)`` of what enters it, and of what it should give.
        bias: Whether the output may have a bias.
        damping: Share of the mean variance that is added to every variance.
        device: Where the batches are.
    """
    layer = in_fp32(converted, device)
    width, out = converted.output.shape[1] + 1, converted.output.shape[0]
    options = {"dtype": torch.float64, "device": device}
    inner, cross = torch.zeros(width, width, **options), torch.zeros(out, width, **options)
    for inputs, outputs in wanted:
        for x, y in zip(inputs, outputs, strict=True):
            heads = F.pad(latent_heads(layer, x), (0, 1), value=float(bias)).double()
            inner += heads.mT @ heads
            cross += y.double().mT @ heads
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


def wanted_behind(
    flow: Activations, behind: Activations, source: GroupedAttentionWeights
) -> Iterator[tuple[Tensor, Tensor]]:
    """What enters a converted layer, and what would make hidden states those of the source again.

    Args:
        flow: Of the source, at this layer.
        behind: Of the converted layers before it, at this layer.
        source: The layer that is converted.
    """
    attend = partial(grouped_attention, in_fp32(source, flow.device))
    streams = zip(flow.inputs(), flow.states(), behind.inputs(), behind.states(), strict=True)
    for x, states, y, reached in streams:
        yield y, states + torch.stack([attend(row) for row in x]) - reached
