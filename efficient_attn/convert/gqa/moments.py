"""What calibration keeps of a layer's inputs: their sum and the sum of their outer products."""

from __future__ import annotations

import torch
from torch import Tensor


class InputMoments:
    """Streaming first and second moments of the tokens that enter an attention layer.

    Queries, keys and values are linear in the tokens, so these moments give those of all three for
    whatever weights, and no activation has to be stored.

    Args:
        width: Width ``D`` of a token.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._outer = torch.zeros(width + 1, width + 1, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """Count in tokens ``(..., D)``, products in fp32 or better, sums in fp64."""
        width = len(self._outer) - 1
        if tokens.shape[-1] != width:
            raise ValueError(f"tokens are {tokens.shape[-1]} wide; these moments are of {width}.")
        rows = tokens.detach().reshape(-1, width)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
        self._outer += (rows.mT @ rows).to(self._outer)
        self.count += len(rows)

    @property
    def second(self) -> Tensor:
        """Mean of ``[x, 1] [x, 1]^T``, ``(D + 1, D + 1)`` fp64; its last column holds the mean."""
        if not self.count:
            raise ValueError("no token was counted in; call add() first.")
        return self._outer / self.count


def standard_moment(width: int) -> Tensor:
    """:attr:`InputMoments.second` of uncorrelated tokens of mean 0: weights alone then decide."""
    return torch.eye(width + 1, dtype=torch.float64)
