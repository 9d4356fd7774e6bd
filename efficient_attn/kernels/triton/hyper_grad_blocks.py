"""Gradients of keys and values from blocks: a program owns keys of neighbouring ranks at a level.

The tiles that meet them follow each other, since tiles come in the order of their first rank.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from efficient_attn.kernels.triton._hyper_arguments import (
    HYPER_NOT_SPECIALIZED,
    HyperProblem,
    KeyGradients,
)
from efficient_attn.kernels.triton._hyper_index import meeting_tiles
from efficient_attn.kernels.triton._hyper_tile import (
    gather,
    in_band,
    key_slot,
    near_keys,
    of_sample,
    scatter,
    visit_rows,
    zero_or_ruled_out,
)


@triton.jit(do_not_specialize=HYPER_NOT_SPECIALIZED)
def _hyper_grad_block_kernel(
    grad_k, grad_k_strides, grad_v, grad_v_strides, tile_begin, tile_end, width,
    grad_out, grad_out_strides, delta, log2_lse, padded_queries,
    q, q_strides, k, k_strides, v, v_strides,
    key_order, key_rank, band_start, band_end, block_rows, block_first,
    sample_keys, sample_log_weight,
    num_q_heads, num_k_heads, num_queries, num_keys, num_levels, num_tiles, tile_rows,
    num_sets, sample_size, block_size, leaf_size, window, sinks, first_leaf, first_set, scale,
    num_blocks, HALVES: tl.constexpr, CAUSAL: tl.constexpr, BY_LEAF: tl.constexpr,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What the bands of one level give to the keys of neighbouring ranks."""
    program = tl.program_id(0)
    block = program % num_blocks
    level = program // num_blocks % num_levels
    plane = program // num_blocks // num_levels
    sample, head = plane // num_k_heads, plane % num_k_heads
    group = num_q_heads // num_k_heads
    ranks = block * COLUMNS + tl.arange(0, COLUMNS)
    exists = ranks < num_keys
    has, slots = key_slot(level, ranks, leaf_size, width, HALVES)
    has &= exists
    if tl.max(has.to(tl.int32), 0) == 0:
        return
    level_plane = tl.cast(plane, tl.int64) * num_levels + level
    columns = tl.load(key_order + level_plane * num_keys + ranks, mask=exists, other=0)
    keys, values = of_sample(k, k_strides, sample), of_sample(v, v_strides, sample)
    k_tile = gather(keys, k_strides, head, columns, exists, DIM_QK, BLOCK_QK)
    v_tile = gather(values, v_strides, head, columns, exists, DIM_V, BLOCK_V)
    k_acc = tl.zeros((COLUMNS, BLOCK_QK), tl.float32)
    v_acc = tl.zeros((COLUMNS, BLOCK_V), tl.float32)
    queries_of, grads_of = (
        of_sample(q, q_strides, sample),
        of_sample(grad_out, grad_out_strides, sample),
    )

    bounds = (tl.cast(plane, tl.int64) * num_levels + level) * num_blocks + block
    parts = tl.cdiv(tile_rows, ROWS)
    tiles = tl.cast(plane, tl.int64) * num_tiles
    begin, end = tl.load(tile_begin + bounds), tl.load(tile_end + bounds)
    for index in tl.range(begin * parts, end * parts):
        tile = index // parts
        places = index % parts * ROWS + tl.arange(0, ROWS)
        first = tl.load(block_first + tiles + tile) - level * num_keys
        rows = tl.load(
            block_rows + (tiles + tile) * tile_rows + places, mask=places < tile_rows, other=-1
        )
        # A tile of the level before reaches beyond that level's last rank at most.
        rows = tl.where(first >= 0, rows, -1)
        inside = rows >= 0
        rows = tl.maximum(rows, 0)
        heads, queries = head * group + rows // num_queries, rows % num_queries
        row_plane = level_plane * (group * num_queries)
        ends = tl.load(band_end + row_plane + rows, mask=inside, other=0)
        counts = in_band(ranks[:, None], first, ends[None, :])
        if BY_LEAF and not CAUSAL:
            positions = queries + (num_keys - num_queries)
            near_first, near_end = near_keys(
                positions, num_keys, first_leaf, leaf_size, window, CAUSAL
            )
            counts &= ~in_band(columns[:, None], near_first[None, :], near_end[None, :])
        q_tile = gather(queries_of, q_strides, heads, queries, inside, DIM_QK, BLOCK_QK)
        g_tile = gather(grads_of, grad_out_strides, heads, queries, inside, DIM_V, BLOCK_V)
        statistics = (tl.cast(sample, tl.int64) * num_q_heads + heads) * padded_queries + queries
        row_lse = tl.load(log2_lse + statistics, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + statistics, mask=inside, other=0.0)
        k_acc, v_acc = visit_rows(
            k_tile, v_tile, q_tile, g_tile, zero_or_ruled_out(counts), scale,
            row_lse, row_delta, k_acc, v_acc, grad_k is not None, grad_v is not None,
        )  # fmt: skip
    if grad_k is not None:
        outs = of_sample(grad_k, grad_k_strides, sample)
        scatter(outs, grad_k_strides, head, slots, has, k_acc * scale, DIM_QK)
    if grad_v is not None:
        scatter(
            of_sample(grad_v, grad_v_strides, sample),
            grad_v_strides,
            head,
            slots,
            has,
            v_acc,
            DIM_V,
        )


def launch(problem: HyperProblem, shared: dict[str, Any], like: KeyGradients) -> KeyGradients:
    """What keys get at each level, in the order of their ranks."""
    tile = problem.tile("hyper_grad_key_value")
    tile_begin, tile_end = meeting_tiles(problem.plan, tile.columns)
    num_blocks = triton.cdiv(problem.num_keys, tile.columns)
    grads = like.empty(problem.num_levels * problem.key_width())
    problem.launch(
        _hyper_grad_block_kernel,
        problem.num_planes * problem.num_levels * num_blocks,
        tile,
        tile_begin=tile_begin,
        tile_end=tile_end,
        width=problem.key_width(),
        num_blocks=num_blocks,
        **grads.arguments("grad"),
        **shared,
    )
    return grads
