"""What a mask says, told as runs of queries that see a run of keys, all or in causal order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Queries ``[first, last)`` and keys ``[start, stop)``.

    Every query sees every key, or, if ``causal``, the last query sees every key and each query
    before it one less. Where queries and keys are as many, they stand opposite each other.
    """

    first: int
    last: int
    start: int
    stop: int
    causal: bool


def visible_spans(mask: Tensor, num_queries: int) -> list[tuple[Span, ...]] | None:
    """The spans of each row of the batch, or None if the mask is not of that kind.

    Full and causal masks are, with padding on either side or both, behind a cached prefix and in
    front of empty places. Windows, chunks and additive biases are not. Queries in no span see
    nothing.

    Args:
        mask: True where a key is seen, or added to the scores: 0, or the smallest number or
            ``-inf`` where it is not. ``(B, 1 | heads, 1 | num_queries, keys)``.
        num_queries: How many queries there are.
    """
    if mask.is_floating_point():
        hidden = mask <= torch.finfo(mask.dtype).min
        if not bool(((mask == 0) | hidden).all()):
            return None
        mask = ~hidden
    if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
        return None
    seen = mask[:, 0].expand(-1, num_queries, -1)
    keys = seen.shape[-1]
    count = seen.sum(-1)
    start = torch.where(count > 0, seen.int().argmax(-1), 0)
    # Nothing but the run that starts there is seen.
    place = torch.arange(keys, device=mask.device)
    run = (place >= start.unsqueeze(-1)) & (place < (start + count).unsqueeze(-1))
    if not bool((run == seen).all()):
        return None
    batch = [_spans(keys, *row) for row in zip(start.tolist(), count.tolist(), strict=True)]
    return None if None in batch else batch


def _spans(keys: int, start: list[int], count: list[int]) -> tuple[Span, ...] | None:
    """The spans of one sample, given the first key and the number of keys that each query sees."""
    seeing = [i for i, number in enumerate(count) if number]
    if not seeing:
        return ()
    first, last = seeing[0], seeing[-1] + 1
    begin, stop = start[first], start[first] + max(count)
    # In causal order until everything is seen; from there on, all is seen.
    full = first + stop - begin - count[first]
    expected = [min(count[first] + i, stop - begin) for i in range(last - first)]
    if count[first:last] != expected or any(x != begin for x in start[first:last]):
        return None
    if full > first:
        ends, causal = (first, full + 1, last), (True, False)
    elif len(count) == keys:
        # Tokens among themselves: those that are seen stand opposite themselves.
        ends, causal = (first, max(first, begin), min(stop, last), last), (False,) * 3
    else:
        ends, causal = (first, last), (False,)
    runs = zip(ends, ends[1:], causal, strict=False)
    return tuple(Span(a, b, begin, stop, order) for a, b, order in runs if a < b)
