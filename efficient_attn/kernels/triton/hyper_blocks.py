"""HyperAttention's block tiles: rows that share a block of keys, and outside of leaves a sample.

All levels are one launch. The walk gives outputs, and backward the gradients of queries.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from efficient_attn.kernels.triton._hyper_arguments import (
    HYPER_NOT_SPECIALIZED,
    HyperProblem,
)
from efficient_attn.kernels.triton._hyper_tile import (
    gather,
    in_band,
    near_keys,
    of_sample,
    query_slot,
    scatter,
    visit_keys,
    zero_or_ruled_out,
)
from efficient_attn.kernels.triton._tile import LN2


@triton.jit(do_not_specialize=HYPER_NOT_SPECIALIZED)
def _hyper_block_kernel(
    out, out_strides, lse, width,
    grad_out, grad_out_strides, delta, log2_lse, padded_queries,
    q, q_strides, k, k_strides, v, v_strides,
    key_order, key_rank, band_start, band_end, block_rows, block_first, block_sample,
    sample_keys, sample_log_weight,
    num_q_heads, num_k_heads, num_queries, num_keys, num_levels, num_tiles, tile_rows,
    num_sets, sample_size, block_size, leaf_size, window, sinks, first_leaf, first_set, scale,
    num_blocks, HALVES: tl.constexpr, CAUSAL: tl.constexpr, BY_LEAF: tl.constexpr,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A part of the rows of one block tile, the keys of their band, and their sample."""
    program = tl.program_id(0)
    part = program % num_blocks
    tile = program // num_blocks % num_tiles
    plane = program // num_blocks // num_tiles
    sample, head = plane // num_k_heads, plane % num_k_heads
    places = part * ROWS + tl.arange(0, ROWS)
    block_rows += (tl.cast(plane, tl.int64) * num_tiles + tile) * tile_rows
    if tl.load(block_rows + part * ROWS) < 0:
        return
    rows = tl.load(block_rows + places, mask=places < tile_rows, other=-1)
    inside = rows >= 0
    rows = tl.maximum(rows, 0)
    heads = head * (num_q_heads // num_k_heads) + rows // num_queries
    queries = rows % num_queries

    first = tl.load(block_first + tl.cast(plane, tl.int64) * num_tiles + tile)
    level, first_rank = first // num_keys, first % num_keys
    row_plane = (tl.cast(plane, tl.int64) * num_levels + level) * (
        num_q_heads // num_k_heads * num_queries
    )
    ends = tl.load(band_end + row_plane + rows, mask=inside, other=0)
    key_plane = (tl.cast(plane, tl.int64) * num_levels + level) * num_keys
    keys, values = of_sample(k, k_strides, sample), of_sample(v, v_strides, sample)
    if BY_LEAF and not CAUSAL:
        positions = queries + (num_keys - num_queries)
        near_first, near_end = near_keys(positions, num_keys, first_leaf, leaf_size, window, CAUSAL)

    q_tile = gather(
        of_sample(q, q_strides, sample), q_strides, heads, queries, inside, DIM_QK, BLOCK_QK
    )
    if grad_out is None:
        g_tile = None
        row_first = tl.full((ROWS,), float("-inf"), tl.float32)
        row_second = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
    else:
        grads = of_sample(grad_out, grad_out_strides, sample)
        g_tile = gather(grads, grad_out_strides, heads, queries, inside, DIM_V, BLOCK_V)
        statistics = (tl.cast(sample, tl.int64) * num_q_heads + heads) * padded_queries + queries
        row_first = tl.load(log2_lse + statistics, mask=inside, other=float("inf"))
        row_second = tl.load(delta + statistics, mask=inside, other=0.0)
        acc = tl.zeros((ROWS, BLOCK_QK), tl.float32)

    last = tl.minimum(first_rank + block_size, tl.max(ends, 0))
    for start in tl.range(first_rank, last, COLUMNS):
        ranks = start + tl.arange(0, COLUMNS)
        exists = ranks < last
        columns = tl.load(key_order + key_plane + ranks, mask=exists, other=0)
        counts = exists[None, :] & (ranks[None, :] < ends[:, None])
        if BY_LEAF and not CAUSAL:
            counts &= ~in_band(columns[None, :], near_first[:, None], near_end[:, None])
        k_tile = gather(keys, k_strides, head, columns, exists, DIM_QK, BLOCK_QK)
        v_tile = gather(values, v_strides, head, columns, exists, DIM_V, BLOCK_V)
        row_first, row_second, acc = visit_keys(
            q_tile,
            k_tile,
            v_tile,
            zero_or_ruled_out(counts),
            scale,
            g_tile,
            row_first,
            row_second,
            acc,
        )

    if not BY_LEAF:
        number = tl.load(block_sample + tile)
        drawn_keys = sample_keys + (tl.cast(head, tl.int64) * num_sets + number) * sample_size
        weights = sample_log_weight + tl.cast(number, tl.int64) * sample_size
        for start in tl.range(0, sample_size, COLUMNS):
            turns = start + tl.arange(0, COLUMNS)
            exists = turns < sample_size
            columns = tl.load(drawn_keys + turns, mask=exists, other=0)
            log_weights = tl.load(weights + turns, mask=exists, other=float("-inf"))
            ranks = tl.load(key_rank + key_plane + columns, mask=exists, other=0)
            banned = in_band(ranks[None, :], first_rank, ends[:, None])
            log_weights = tl.where(banned, float("-inf"), log_weights[None, :])
            k_tile = gather(keys, k_strides, head, columns, exists, DIM_QK, BLOCK_QK)
            v_tile = gather(values, v_strides, head, columns, exists, DIM_V, BLOCK_V)
            row_first, row_second, acc = visit_keys(
                q_tile, k_tile, v_tile, log_weights, scale, g_tile, row_first, row_second, acc
            )

    _, slots = query_slot(level, queries, num_queries, num_keys, leaf_size, width, HALVES)
    outs = of_sample(out, out_strides, sample)
    offsets = (tl.cast(sample, tl.int64) * num_q_heads + heads) * (num_levels * width) + slots
    if grad_out is None:
        row_second = tl.where(row_second == 0.0, 1.0, row_second)
        acc = acc * (1.0 / row_second)[:, None]
        scatter(outs, out_strides, heads, slots, inside, acc, DIM_V)
        tl.store(lse + offsets, (row_first + tl.log2(row_second)) * LN2, mask=inside)
    else:
        scatter(outs, out_strides, heads, slots, inside, acc * scale, DIM_QK)
        if lse is not None:
            # Says that there is something.
            tl.store(lse + offsets, tl.zeros((ROWS,), tl.float32), mask=inside)


def launch(
    problem: HyperProblem, shared: dict[str, Any], out: Tensor, lse: Tensor | None, width: int
) -> None:
    """Fill in what the blocks of each level give, ``width`` rows for each level."""
    tile = problem.row_tile(shared)
    num_tiles, tile_rows = problem.plan.block_rows.shape[2:]
    num_blocks = triton.cdiv(tile_rows, tile.rows)
    problem.launch(
        _hyper_block_kernel,
        problem.num_planes * num_tiles * num_blocks,
        tile,
        out=out,
        out_strides=problem.strides(out),
        lse=lse,
        width=width,
        block_sample=problem.plan.block_sample,
        num_blocks=num_blocks,
        **shared,
    )
