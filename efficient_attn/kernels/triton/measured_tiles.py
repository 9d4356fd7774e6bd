"""Tiles that were measured, as `python -m bench tune` prints them; those not listed are untuned.

An entry reads::

    Entry("forward", "sm90", "3.6", 2, "plain", (128, 128)): (Tile(128, 64, 8, 3), "the device"),

with the kernel, the family of the device, the version of Triton, the bytes of an element, the kind
of call, and its size: the largest head dims of the bucket or, of a cache, the rows of a tile and
the largest number of columns that are loaded for each token.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Tile(NamedTuple):
    """Rows are queries and columns are keys, whichever of them the kernel walks along."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """The launch options of a kernel."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            # Triton 3.10 changes the default, and an unfused multiply-add costs a fifth.
            "enable_fp_fusion": True,
        }


class Entry(NamedTuple):
    """What a tile is chosen by. It never contains a sequence length."""

    kernel: str
    arch: str
    triton: str
    element_size: int
    kind: str
    size: tuple[int, int]


MEASURED: dict[Entry, tuple[Tile, str]] = {}
