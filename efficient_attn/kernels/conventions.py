"""What kernels agree on: how results are stored, sums kept, and scores told apart."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores of key heads that differ by less than this share of the largest give even groups.
SMALLEST_SPREAD = 1e-6


def tokens_major(x: Tensor) -> Tensor:
    """``(B, H, N, D)`` stored as ``(B, N, H, D)``, which makes merging the heads a view."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums, and the log-sum-exp, are fp32; fp64 beside fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
