"""The perturbation of PGQA."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.functional import _contract as contract


def perturb_heads(out: Tensor, noise: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """Centre each head's output and subtract noise as large as its spread: ``o - mu - sigma n``.

    ``mu`` and ``sigma`` are the mean and the unbiased standard deviation of one head of one sample,
    over tokens and channels. Gradients flow through both.

    Source: Khan et al., Beyond Uniform Query Distribution, arXiv 2408.08454.

    Args:
        out: Attended heads.
        noise: Of mean 0 and variance 1, shared by the samples or one for each.
        lengths: How many leading tokens of each sample count for the statistics; by default all.

    Shape:
        - out: ``(B, H, N, D)``; noise: ``(H, N, D)`` or ``(B, H, N, D)``; lengths: ``(B,)``
        - output: ``(B, H, N, D)``

    Raises:
        ValueError: A shape does not fit.
    """
    if out.dim() != 4 or noise.shape not in (out.shape, out.shape[1:]):
        raise ValueError(
            f"out has shape {tuple(out.shape)} and noise {tuple(noise.shape)}; they must be "
            "(batch, heads, tokens, dim) and the same, or the same without batch."
        )
    contract.check_key_lengths(lengths, out, "lengths")
    # Statistics of low precision are taken in fp32.
    wide = out if out.dtype == torch.float64 else out.float()
    tokens, dim = out.shape[2:]
    if lengths is None:
        count, deviation = tokens * dim, wide - wide.mean((2, 3), keepdim=True)
        spread = deviation
    else:
        count = (lengths * dim).view(-1, 1, 1, 1)
        counts = (torch.arange(tokens, device=out.device) < lengths[:, None])[:, None, :, None]
        total = wide.where(counts, 0.0).sum((2, 3), keepdim=True)
        deviation = wide - total / count.clamp(min=1)
        spread = deviation.where(counts, 0.0)
    # A norm has a gradient where it is zero; a square root of a sum has none.
    freedom = torch.as_tensor(count - 1, device=out.device).clamp(min=1).to(wide.dtype)
    sigma = torch.linalg.vector_norm(spread, dim=(2, 3), keepdim=True) / freedom.sqrt()
    return (deviation - sigma * noise).to(out.dtype)
