"""HyperAttention's leaves: neighbouring rows, the keys near to them, and the sample of the leaf.

What blocks gave for the rows is merged in registers. The walk gives outputs, and backward the
gradients of queries.
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
from efficient_attn.kernels.triton._tile import LN2, LOG2E


@triton.jit(do_not_specialize=HYPER_NOT_SPECIALIZED)
def _hyper_leaf_kernel(
    out, out_strides, lse, block_out, block_out_strides, block_lse, width,
    grad_out, grad_out_strides, delta, log2_lse, padded_queries,
    q, q_strides, k, k_strides, v, v_strides,
    key_order, key_rank, band_start, band_end, block_rows, block_first,
    sample_keys, sample_log_weight,
    num_q_heads, num_k_heads, num_queries, num_keys, num_levels, num_tiles, tile_rows,
    num_sets, sample_size, block_size, leaf_size, window, sinks, first_leaf, first_set, scale,
    num_blocks, num_leaves, HALVES: tl.constexpr, CAUSAL: tl.constexpr, BY_LEAF: tl.constexpr,
    WITH_BANDS: tl.constexpr,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of one leaf and query head: near keys, sinks, sample, and what blocks gave."""
    program = tl.program_id(0)
    part = program % num_blocks
    # Under a causal mask the last part of a long leaf takes longest, and should start first.
    part = num_blocks - 1 - part
    index = program // num_blocks % num_leaves
    sample = program // num_blocks // num_leaves // num_q_heads
    q_head = program // num_blocks // num_leaves % num_q_heads
    head = q_head // (num_q_heads // num_k_heads)
    corner = num_keys - num_queries
    leaf = first_leaf + index
    in_leaf = part * ROWS + tl.arange(0, ROWS)
    positions = leaf * leaf_size + in_leaf
    queries = positions - corner
    inside = (in_leaf < leaf_size) & (queries >= 0) & (queries < num_queries)
    if tl.max(inside.to(tl.int32), 0) == 0:
        return
    keys, values = of_sample(k, k_strides, sample), of_sample(v, v_strides, sample)
    queries = tl.minimum(tl.maximum(queries, 0), num_queries - 1)
    q_tile = gather(
        of_sample(q, q_strides, sample), q_strides, q_head, queries, inside, DIM_QK, BLOCK_QK
    )
    if grad_out is None:
        g_tile = None
        row_first = tl.full((ROWS,), float("-inf"), tl.float32)
        row_second = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
    else:
        grads = of_sample(grad_out, grad_out_strides, sample)
        g_tile = gather(grads, grad_out_strides, q_head, queries, inside, DIM_V, BLOCK_V)
        statistics = (tl.cast(sample, tl.int64) * num_q_heads + q_head) * padded_queries + queries
        row_first = tl.load(log2_lse + statistics, mask=inside, other=float("inf"))
        row_second = tl.load(delta + statistics, mask=inside, other=0.0)
        acc = tl.zeros((ROWS, BLOCK_QK), tl.float32)

    near_first, ends = near_keys(positions, num_keys, first_leaf, leaf_size, window, CAUSAL)
    # The same for all rows, but for the end under a causal mask.
    first, end = tl.min(near_first, 0), tl.max(tl.where(inside, ends, 0), 0)
    full_end = tl.min(tl.where(inside, ends, num_keys), 0)
    full_end = first + tl.maximum(full_end - first, 0) // COLUMNS * COLUMNS
    for start in tl.range(first, full_end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k_tile = gather(keys, k_strides, head, columns, columns < num_keys, DIM_QK, BLOCK_QK)
        v_tile = gather(values, v_strides, head, columns, columns < num_keys, DIM_V, BLOCK_V)
        row_first, row_second, acc = visit_keys(
            q_tile, k_tile, v_tile, None, scale, g_tile, row_first, row_second, acc
        )
    for start in tl.range(full_end, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        counts = columns[None, :] < ends[:, None]
        k_tile = gather(keys, k_strides, head, columns, columns < end, DIM_QK, BLOCK_QK)
        v_tile = gather(values, v_strides, head, columns, columns < end, DIM_V, BLOCK_V)
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

    if BY_LEAF:
        # Rows without near keys are before the first, and under a causal mask see nothing.
        far_sinks = tl.minimum(sinks, first)
        for start in tl.range(0, tl.minimum(sinks, num_keys), COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            far = columns < far_sinks
            if not CAUSAL:
                far |= (columns < sinks) & (columns >= end)
            k_tile = gather(keys, k_strides, head, columns, far, DIM_QK, BLOCK_QK)
            v_tile = gather(values, v_strides, head, columns, far, DIM_V, BLOCK_V)
            row_first, row_second, acc = visit_keys(
                q_tile,
                k_tile,
                v_tile,
                zero_or_ruled_out(far)[None, :],
                scale,
                g_tile,
                row_first,
                row_second,
                acc,
            )
        number = leaf - first_set
        # Leaves before the first key have no sample under a causal mask.
        size = tl.where(number < 0, 0, sample_size)
        drawn_keys = sample_keys + (tl.cast(head, tl.int64) * num_sets + number) * sample_size
        weights = sample_log_weight + tl.cast(number, tl.int64) * sample_size
        if WITH_BANDS:
            plane = tl.cast(sample, tl.int64) * num_k_heads + head
            group = num_q_heads // num_k_heads
            bands = plane * (group * num_queries) + q_head % group * num_queries + queries
            band_starts = tl.load(band_start + bands, mask=inside, other=0)
            band_ends = tl.load(band_end + bands, mask=inside, other=0)
        for start in tl.range(0, size, COLUMNS):
            turns = start + tl.arange(0, COLUMNS)
            exists = turns < sample_size
            columns = tl.load(drawn_keys + turns, mask=exists, other=0)
            log_weights = tl.load(weights + turns, mask=exists, other=float("-inf"))[None, :]
            if WITH_BANDS:
                ranks = tl.load(key_rank + plane * num_keys + columns, mask=exists, other=0)
                banned = in_band(ranks[None, :], band_starts[:, None], band_ends[:, None])
                log_weights = tl.where(banned, float("-inf"), log_weights)
            k_tile = gather(keys, k_strides, head, columns, exists, DIM_QK, BLOCK_QK)
            v_tile = gather(values, v_strides, head, columns, exists, DIM_V, BLOCK_V)
            row_first, row_second, acc = visit_keys(
                q_tile, k_tile, v_tile, log_weights, scale, g_tile, row_first, row_second, acc
            )

    if grad_out is not None:
        acc *= scale
    if block_out is not None:
        parts = of_sample(block_out, block_out_strides, sample)
        for level in tl.range(0, num_levels):
            has, slots = query_slot(level, queries, num_queries, num_keys, leaf_size, width, HALVES)
            offsets = (tl.cast(sample, tl.int64) * num_q_heads + q_head) * (num_levels * width)
            part_lse = tl.load(block_lse + offsets + slots, mask=inside & has, other=float("-inf"))
            has = part_lse != float("-inf")
            if grad_out is None:
                part_out = gather(parts, block_out_strides, q_head, slots, has, DIM_V, BLOCK_V).to(
                    tl.float32
                )
                part_lse *= LOG2E
                new_max = tl.maximum(row_first, part_lse)
                anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
                decay, weight = tl.exp2(row_first - anchor), tl.exp2(part_lse - anchor)
                row_first = new_max
                row_second = row_second * decay + weight
                acc = acc * decay[:, None] + part_out * weight[:, None]
            else:
                part_out = gather(parts, block_out_strides, q_head, slots, has, DIM_QK, BLOCK_QK)
                acc += part_out.to(tl.float32)

    outs = of_sample(out, out_strides, sample)
    if grad_out is None:
        row_second = tl.where(row_second == 0.0, 1.0, row_second)
        acc = acc * (1.0 / row_second)[:, None]
        scatter(outs, out_strides, q_head, queries, inside, acc, DIM_V)
        offsets = (tl.cast(sample, tl.int64) * num_q_heads + q_head) * num_queries + queries
        tl.store(lse + offsets, (row_first + tl.log2(row_second)) * LN2, mask=inside)
    else:
        scatter(outs, out_strides, q_head, queries, inside, acc, DIM_QK)


def launch(
    problem: HyperProblem,
    shared: dict[str, Any],
    out: Tensor,
    lse: Tensor | None,
    of_blocks: tuple[Tensor, Tensor] | None,
    width: int,
) -> None:
    """Fill in the result, of which ``of_blocks`` (results and their log-sum-exps) is a part."""
    tile = problem.row_tile(shared)
    num_blocks = triton.cdiv(problem.plan.leaf_size, tile.rows)
    block_out, block_lse = of_blocks or (None, None)
    problem.launch(
        _hyper_leaf_kernel,
        problem.num_samples * problem.num_q_heads * len(problem.leaves) * num_blocks,
        tile,
        out=out,
        out_strides=problem.strides(out),
        lse=lse,
        block_out=block_out,
        block_out_strides=None if block_out is None else problem.strides(block_out),
        block_lse=block_lse,
        width=width,
        num_blocks=num_blocks,
        num_leaves=len(problem.leaves),
        WITH_BANDS=problem.num_levels > 0,
        **shared,
    )
