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


def lsh_codes(
    x: Tensor, normals: Tensor, bits: int, center: bool, leaf: int, first: int, own: bool
) -> Tensor:
    """The ``lsh_codes`` op: the code of every token, after a mean has been subtracted.

    The side of a hyperplane on which ``x - mean`` lies is told by comparing projections, so nothing
    is subtracted from the tokens themselves.

    Args:
        x: Tokens.
        normals: All the directions there could be, fp32: a product with a few columns is slower.
        bits: How many of them are used.
        center: Subtract the mean; otherwise nothing.
        leaf: With 0 the mean is that of all tokens; otherwise that of all leaves of so many
            positions before a token's own.
        first: The position of token 0. A position below 0 counts as 0.
        own: Whether the mean takes in a token's own leaf.

    Shape:
        - x: ``(B, H, tokens, D)``; normals: ``(D, projections)``; out: ``(B, H, tokens)``, int32
    """
    projections = (x.float() @ normals)[..., :bits]
    if not center:
        return codes(projections, 0.0)
    if leaf == 0:
        return codes(projections, projections.mean(-2, keepdim=True))
    positions = (torch.arange(x.shape[2], device=x.device) + first).clamp(min=0)
    number = torch.div(positions, leaf, rounding_mode="floor")
    num_leaves = max(first + x.shape[2] - 1, 0) // leaf + 1
    return codes(projections, past_mean(projections, number, num_leaves, own))


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
