"""Cutting an attention call into rectangles of scores that torch's CPU flash op can compute."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Heads = slice | list[int] | Tensor


class Problem(NamedTuple):
    """Query heads of some samples, and the key and value heads that they read.

    A slice of heads is read in even groups. Otherwise each query head has its own entry, in a list
    for all samples or in a tensor with one row for each. Only the first ``length`` keys count.
    """

    samples: slice
    q_heads: slice
    k_heads: Heads
    v_heads: Heads
    length: int


class Piece(NamedTuple):
    """A rectangle of scores that one call computes; pieces of equal rows are merged."""

    rows: slice
    columns: slice
    causal: bool
    masked: bool


def problems(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_to_k: Tensor | None,
    q_to_v: Tensor | None,
    key_lengths: Tensor | None,
    even_groups: bool,
    whole: bool = True,
) -> Iterator[Problem]:
    """Cut the call where samples differ, and where their map is not even.

    A batch that occupies every thread is cut into runs of even groups where its map allows it, and
    heads are read where they lie. Otherwise heads are cut into chunks. A chunk has as many as there
    are key or value heads, so that what is copied for it is never larger than what there is to
    read; and enough to occupy every thread.

    Args:
        query: ``(B, Hq, Nq, D)``.
        key: ``(B, Hk, Nk, D)``.
        value: ``(B, Hv, Nk, Dv)``.
        q_to_k: As in the ``attention`` op.
        q_to_v: As in the ``attention`` op.
        key_lengths: As in the ``attention`` op.
        even_groups: Whether the op serves even groups.
        whole: Whether a map that is even may stay whole.
    """
    batch, num_k_heads, nk, _ = key.shape
    num_heads, num_v_heads = query.shape[1], value.shape[1]
    even = q_to_k is None and q_to_v is None and num_k_heads == num_v_heads
    even = even and even_groups and whole
    if key_lengths is None:
        samples = [(slice(0, batch), nk)]
    else:
        samples = [(slice(b, b + 1), length) for b, length in enumerate(key_lengths.tolist())]
    for which, length in samples:
        if length == 0:
            continue
        if even:
            yield Problem(which, slice(0, num_heads), slice(None), slice(None), length)
            continue
        together = which.stop - which.start
        k_heads = _entries(q_to_k, which, num_heads, num_k_heads)
        v_heads = _entries(q_to_v, which, num_heads, num_v_heads)
        occupied = together >= 4 * torch.get_num_threads()
        runs = _runs(k_heads, v_heads) if even_groups and occupied else []
        if 0 < len(runs) <= max(num_k_heads, num_v_heads):
            for heads in runs:
                yield Problem(which, *heads, length)
            continue
        largest = max(num_k_heads, num_v_heads, -(-torch.get_num_threads() // together))
        chunk = -(-num_heads // -(-num_heads // largest))
        for start in range(0, num_heads, chunk):
            heads = slice(start, min(start + chunk, num_heads))
            yield Problem(which, heads, _part(k_heads, heads), _part(v_heads, heads), length)


def _entries(
    index: Tensor | None, samples: slice, num_q_heads: int, num_heads: int
) -> list[int] | Tensor:
    if index is None:
        return [head * num_heads // num_q_heads for head in range(num_q_heads)]
    if index.dim() == 1:
        return index.tolist()
    rows = index[samples]
    return rows[0].tolist() if len(rows) == 1 else rows


def _part(entries: list[int] | Tensor, heads: slice) -> list[int] | Tensor:
    return entries[:, heads] if isinstance(entries, Tensor) else entries[heads]


def _runs(
    k_heads: list[int] | Tensor, v_heads: list[int] | Tensor
) -> list[tuple[slice, slice, slice]]:
    """Query heads side by side that read heads side by side in even groups, if samples agree."""
    if isinstance(k_heads, Tensor) or isinstance(v_heads, Tensor):
        return []
    pairs = zip(k_heads, v_heads, strict=True)
    groups = [(*pair, len(list(same))) for pair, same in itertools.groupby(pairs)]
    runs, start = [], 0
    for number, (k, v, size) in enumerate(groups):
        if number and groups[number - 1] == (k - 1, v - 1, size):
            q, ks, vs = runs.pop()
            heads = (q.start, ks.start, vs.start)
        else:
            heads = (start, k, v)
        start += size
        runs.append(tuple(map(slice, heads, (start, k + 1, v + 1))))
    return runs


def pieces(nq: int, nk: int, left: int | None, right: int | None) -> Iterator[list[Piece]]:
    """Cut the visible scores into rectangles, as lists of pieces that share their rows."""
    corner = nk - nq
    # The last query reaches back over nk - 1 keys, the first one forward over nq - 1.
    left = None if left is not None and left >= nk - 1 else left
    right = None if right is not None and right >= nq - 1 else right
    if left is None and right is None:
        yield [Piece(slice(0, nq), slice(0, nk), causal=False, masked=False)]
    elif left is None and right == 0:
        # Queries before the diagonal see nothing; keys before it are seen by all.
        rows = slice(max(0, -corner), nq)
        square = Piece(rows, slice(max(0, corner), nk), causal=True, masked=False)
        before = Piece(rows, slice(0, corner), causal=False, masked=False)
        yield [before, square] if corner > 0 else [square]
    else:
        size = _window_block(nk, left, right)
        first = 0 if right is None else max(0, -corner - right)
        for start in range(first, nq, size):
            stop = min(start + size, nq)
            low = 0 if left is None else max(0, start + corner - left)
            high = nk if right is None else min(nk, stop + corner + right)
            if low < high:
                yield [Piece(slice(start, stop), slice(low, high), causal=False, masked=True)]


def _window_block(nk: int, left: int | None, right: int | None) -> int:
    """Rows per block: a quarter of the window keeps wasted scores below that share."""
    width = nk if left is None or right is None else left + right + 1
    return min(512, max(64, width // 4))
