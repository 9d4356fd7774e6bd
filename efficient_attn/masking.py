"""Which keys a query may see, stated once for every implementation.

Positions are compared along the diagonal that ends in the lower right corner: with ``nq`` queries
and ``nk`` keys, query ``i`` stands at key position ``i + nk - nq``, so the last query stands at the
last key. A window ``(left, right)`` opens that many keys to either side of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

Window = tuple[int | None, int | None]


def window_limits(causal: bool, window: Window | None) -> Window:
    """Fold ``causal`` into a window; ``None`` on a side means that it is not limited.

    Raises:
        TypeError: ``window`` is not a pair.
        ValueError: A limit is negative.
    """
    if window is None:
        return (None, 0) if causal else (None, None)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(
            f"window is {window!r}; pass (left, right), the number of keys visible on each side of "
            "the diagonal, None for unlimited. A causal window over the last w keys is (w - 1, 0)."
        )
    left, right = window
    for side, limit in (("left", left), ("right", right)):
        if limit is not None and limit < 0:
            raise ValueError(
                f"the {side} limit of window is {limit}; it must be at least 0, or None for "
                "unlimited."
            )
    return (left, 0) if causal else (left, right)


def visible(
    nq: int, nk: int, left: int | None, right: int | None, device: torch.device | None = None
) -> Tensor:
    """The boolean ``(nq, nk)`` mask of a window, true where a query sees a key."""
    query = torch.arange(nq, device=device).unsqueeze(-1) + (nk - nq)
    key = torch.arange(nk, device=device)
    mask = torch.ones(nq, nk, dtype=torch.bool, device=device)
    if left is not None:
        mask &= key >= query - left
    if right is not None:
        mask &= key <= query + right
    return mask


def count_visible(nq: int, nk: int, left: int | None, right: int | None) -> int:
    """The number of true entries of :func:`visible`, in closed form."""

    def up_to(diagonal: int) -> int:
        """Pairs ``(i, j)`` with ``j - i <= diagonal``."""
        return _clamped_sum(nq + diagonal, nk) - _clamped_sum(diagonal, nk)

    corner = nk - nq
    above = nq * nk if right is None else up_to(corner + right)
    below = 0 if left is None else up_to(corner - left - 1)
    return above - below


def _clamped_sum(x: int, ceiling: int) -> int:
    """``sum(min(m, ceiling) for m in 1..x)``, zero for negative ``x``."""
    x = max(x, 0)
    ramp = min(x, ceiling)
    return ramp * (ramp + 1) // 2 + (x - ramp) * ceiling
