"""Hashed blocks: which keys of similar code each query meets, and in what order to compute them.

Keys are ranked by code, ties by position. A query meets the keys of a band of ranks, and queries
whose bands start together are put into tiles, so that a tile meets one contiguous range of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from efficient_attn.planning.layout import Problem


class Blocks(NamedTuple):
    """The hashed part of a :class:`efficient_attn.planning.HyperPlan`, in its shapes."""

    key_order: Tensor
    key_rank: Tensor
    band_start: Tensor
    band_end: Tensor
    block_rows: Tensor
    block_first: Tensor


def ranked_blocks(
    q_codes: Tensor,
    k_codes: Tensor,
    problems: list[Problem],
    segment_sizes: list[int],
    corner: int,
    sinks: int,
    size: int,
    align: bool,
    num_codes: int,
) -> tuple[Blocks, Tensor]:
    """Sorted queries against sorted keys, block by block, in every segment: the published sortLSH.

    Args:
        q_codes: ``(B, Hk, G, nq)``, of the query heads that read each key head.
        k_codes: ``(B, Hk, nk)``.
        problems: The segments, and who looks at them.
        segment_sizes: Tokens in a segment of each level.
        corner: ``nk - nq``.
        sinks: Keys at the beginning that are in no block.
        size: Keys in a block; 0 for one block without keys.
        align: Move each block to the keys around the code of its middle query.
        num_codes: Number of different codes.

    Returns:
        The blocks, and which problem each tile belongs to, ``(M,)``.
    """
    device = k_codes.device
    batch, num_heads, group, nq = q_codes.shape
    nk, num_rows = k_codes.shape[-1], group * nq
    q_codes, k_codes = q_codes.flatten(2), _without_sinks(k_codes, sinks, num_codes)
    order = torch.ops.efficient_attn.segment_order
    key_order, key_rank = order(k_codes, num_codes + 1, segment_sizes, nk, 0)
    row_order, _ = order(q_codes, num_codes, segment_sizes, nq, corner)

    # Segments keep their place when sorted, so the rows of a problem are a known range.
    per_block, num_blocks = [], []
    for problem in problems:
        count = group * (problem.queries[1] - problem.queries[0])
        num_blocks.append(max(1, -(-(problem.keys[1] - problem.keys[0]) // size)) if size else 1)
        per_block.append(-(-count // num_blocks[-1]))
    tile_rows = max(per_block, default=0)
    source, place, first, end = [], [], [], []
    for problem, rows, blocks in zip(problems, per_block, num_blocks, strict=True):
        count = torch.arange(group * (problem.queries[1] - problem.queries[0]))
        source.append(count + problem.level * num_rows + group * problem.queries[0])
        place.append((len(first) + count // rows) * tile_rows + count % rows)
        base = problem.level * nk + problem.keys[0]
        first += [base + block * size for block in range(blocks)]
        end += [problem.level * nk + problem.keys[1]] * blocks
    source, place = (torch.cat(x).to(device) for x in (source, place))
    first, end = (torch.tensor(x, device=device) for x in (first, end))
    owner = [number for number, blocks in enumerate(num_blocks) for _ in range(blocks)]
    owner = torch.tensor(owner, device=device)

    if align:
        keys, rows = problems[0].keys[1], per_block[0]
        middle = (torch.arange(len(first), device=device) * rows + rows // 2).clamp(
            max=num_rows - 1
        )
        code = q_codes.gather(-1, row_order[:, :, 0].index_select(-1, middle).long())
        among = k_codes.gather(-1, key_order[:, :, 0, :keys].long())
        sides = (torch.searchsorted(among, code, right=right) for right in (False, True))
        first = (sum(sides) // 2 - size // 2).clamp(min=0, max=max(keys - size, 0))
    first = first.expand(batch, num_heads, -1)

    tile = (place // max(tile_rows, 1)).expand(batch, num_heads, -1)
    start = first.gather(-1, tile)
    stop = torch.minimum(start + size, end.expand_as(first).gather(-1, tile))
    row = row_order.flatten(2).index_select(-1, source)
    level = source // max(num_rows, 1)
    return Blocks(
        key_order,
        key_rank,
        *(
            _placed(x - level * nk, row + level * num_rows, (len(segment_sizes), num_rows), 0)
            for x in (start, stop)
        ),
        _placed(row, place.expand_as(row), (len(owner), tile_rows), -1),
        first.int(),
    ), owner.int()


def recent_blocks(
    q_codes: Tensor, k_codes: Tensor, before: Tensor, sinks: int, size: int, num_codes: int
) -> Blocks:
    """The last keys before a query's exact ones that have the query's own code. Strictly causal.

    Keys with one code are cut into half blocks, counted from their first, and a query meets the
    half block in which its past ends and the one before. So the band of a query depends on its own
    code and on keys before ``before`` only.

    Args:
        q_codes: ``(B, Hk, G, nq)``, of the query heads that read each key head.
        k_codes: ``(B, Hk, nk)``.
        before: The first exact key of each query, ``(nq,)``.
        sinks: Keys at the beginning that are in no block.
        size: Keys in a block.
        num_codes: Number of different codes.
    """
    batch, num_heads, group, nq = q_codes.shape
    nk, num_rows, half = k_codes.shape[-1], group * nq, -(-size // 2)
    key = torch.arange(nk, device=k_codes.device)
    k_codes = _without_sinks(k_codes, sinks, num_codes)
    order = torch.ops.efficient_attn.segment_order
    key_order, key_rank = order(k_codes, num_codes + 1, [nk], nk, 0)
    # Code and position in one number, which sorts without ties.
    k_sorted = (k_codes.long() * (nk + 1) + key).gather(-1, key_order[:, :, 0].long())
    q_first = q_codes.long() * (nk + 1)
    bucket = torch.searchsorted(k_sorted, q_first.flatten(2))
    end = torch.searchsorted(k_sorted, (q_first + before).flatten(2))
    start = bucket + ((end - bucket - 1) // half - 1).clamp(min=0) * half
    end, start = (x * (end > bucket) for x in (end, start))

    # Rows in the order of their bands; those without one come last.
    tile_rows = max(16, half // 2)
    num_tiles = -(-num_rows // tile_rows) + min(num_rows, nk // half + num_codes)
    sorted_start, row = torch.sort(torch.where(end > start, start, nk), stable=True)
    index = torch.arange(num_rows, device=key.device).expand_as(row)
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[..., 1:] = sorted_start[..., 1:] != sorted_start[..., :-1]
    within = index - torch.where(begins, index, 0).cummax(-1).values
    tile = (within % tile_rows == 0).cumsum(-1) - 1
    # Rows without a band go to a tile that is cut off again.
    tile = torch.where(sorted_start < nk, tile, num_tiles)
    place = tile * tile_rows + within % tile_rows
    block_rows = _placed(row, place, (num_tiles + 1, tile_rows), -1)[:, :, :-1]
    block_first = _placed(sorted_start, tile, (num_tiles + 1,), 0)[:, :, :-1]
    band = (x.int().unsqueeze(2) for x in (start, end))
    return Blocks(key_order, key_rank, *band, block_rows.contiguous(), block_first.contiguous())


def _without_sinks(k_codes: Tensor, sinks: int, num_codes: int) -> Tensor:
    """Codes of keys, behind all others for those that are in no block."""
    key = torch.arange(k_codes.shape[-1], device=k_codes.device)
    return torch.where(key < sinks, num_codes, k_codes)


def _placed(values: Tensor, index: Tensor, shape: tuple[int, ...], empty: int) -> Tensor:
    """``out[..., index] = values`` in a tensor of that trailing shape, filled with ``empty``."""
    size = torch.Size(shape).numel()
    out = values.new_full((*values.shape[:2], size), empty, dtype=torch.int32)
    return out.scatter_(-1, index, values.int()).view(*values.shape[:2], *shape)
