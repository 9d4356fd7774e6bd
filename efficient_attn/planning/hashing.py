"""Angular locality-sensitive hashing: which side of some random hyperplanes a vector lies on."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.planning.counter import random_normal


def directions(seed: int, dim: int, num_projections: int, device: torch.device) -> Tensor:
    """Gaussian normals of the hyperplanes, fp32 ``(dim, num_projections)``."""
    rows = torch.arange(dim, device=device).unsqueeze(1)
    columns = torch.arange(num_projections, device=device)
    return random_normal(seed, rows, columns).float()


def gray_rank(code: Tensor) -> Tensor:
    """The position of a code of at most 16 bits in Gray's order, where neighbours differ in a bit.

    The inverse of ``rank ^ (rank >> 1)``: each bit becomes the parity of the bits above it.
    """
    for shift in (1, 2, 4, 8):
        code = code ^ (code >> shift)
    return code


def codes(projections: Tensor, threshold: Tensor | float) -> Tensor:
    """The Gray rank of the bits ``projection > threshold``, int32.

    Two vectors at an angle of ``t`` agree in all ``r`` bits with probability ``(1 - t / pi)**r``.

    Shape:
        - projections: ``(..., r)``; out: ``(...)``, in ``[0, 2**r)``
    """
    places = 2 ** torch.arange(projections.shape[-1], device=projections.device)
    bits = (projections > threshold).to(torch.int32)
    return gray_rank((bits * places.to(torch.int32)).sum(-1, dtype=torch.int32))


def past_mean(projections: Tensor, leaf_of_token: Tensor, num_leaves: int, own: bool) -> Tensor:
    """For every token the mean over all tokens of the leaves before its own, or up to its own.

    Zero where there are none.

    Shape:
        - projections, out: ``(..., tokens, r)``; leaf_of_token: ``(tokens,)``
    """
    shape = (*projections.shape[:-2], num_leaves, projections.shape[-1])
    index = leaf_of_token.long()
    sums = projections.new_zeros(shape).index_add_(-2, index, projections).cumsum(-2)
    ones = torch.ones_like(index, dtype=projections.dtype)
    counts = projections.new_zeros(num_leaves).index_add_(0, index, ones).cumsum(0)
    means = sums / counts.clamp(min=1).unsqueeze(-1)
    if not own:
        means = torch.cat([torch.zeros_like(means[..., :1, :]), means[..., :-1, :]], dim=-2)
    return means.index_select(-2, index)
