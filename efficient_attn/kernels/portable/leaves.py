"""The near part of a plan: leaves of neighbouring queries and the contiguous keys around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from efficient_attn.planning import HyperPlan

# Elements of queries computed at once: memory does not grow with the tokens, nor caches overflow.
_ELEMENTS = 1 << 21


class Run(NamedTuple):
    """Leaves of one shape in a row: each of them ``step`` tokens behind the one before.

    ``query`` and ``key`` are the first of the first leaf, ``rows`` and ``width`` the extents of
    each.
    """

    query: int
    key: int
    rows: int
    width: int
    leaves: int
    step: int

    def queries(self, x: Tensor) -> Tensor:
        """The run's part of ``(heads, nq, D)`` as ``(leaves, heads, rows, D)``, a view."""
        return _windows(x, self.query, self.rows, self)

    def keys(self, x: Tensor) -> Tensor:
        """The run's part of ``(heads, nk, D)`` as ``(leaves, heads, width, D)``, a view."""
        return _windows(x, self.key, self.width, self)

    def add_keys(self, total: Tensor, grad: Tensor) -> None:
        """Add ``(leaves, heads, width, D)``, in which leaves overlap, to ``(heads, nk, D)``."""
        for start in range(0, self.width, self.step):
            part = grad[:, :, start : start + self.step]
            piece = self._replace(width=part.shape[2], key=self.key + start)
            piece.keys(total).add_(part)


def leaf_runs(plan: HyperPlan, nq: int, nk: int, width: int) -> Iterator[Run]:
    """The leaves that have queries and near keys: many inner ones together, those at edges alone.

    ``width`` is the number of elements of a token in all heads.
    """
    leaf, corner = plan.leaf_size, nk - nq
    if leaf == 0:
        return
    interior: Run | None = None
    start = max(0, corner) if plan.causal else corner
    while start < nk:
        stop = min((start // leaf + 1) * leaf, nk)
        first, end = start // leaf * leaf - plan.window, stop
        if not plan.causal:
            end = (start // leaf + 1) * leaf + plan.window
        whole = stop - start == leaf and first >= 0 and end <= nk
        first, end = max(first, 0), min(end, nk)
        run = Run(start - corner, first, stop - start, end - first, 1, leaf)
        if whole and first < end:
            interior = run if interior is None else interior._replace(leaves=interior.leaves + 1)
        elif first < end:
            yield run
        start = stop
    if interior is not None:
        together = max(1, _ELEMENTS // (leaf * width))
        for done in range(0, interior.leaves, together):
            yield interior._replace(
                query=interior.query + done * leaf,
                key=interior.key + done * leaf,
                leaves=min(together, interior.leaves - done),
            )


def _windows(x: Tensor, start: int, size: int, run: Run) -> Tensor:
    reach = (run.leaves - 1) * run.step + size
    return x[:, start : start + reach].unfold(1, size, run.step).permute(1, 0, 3, 2)
