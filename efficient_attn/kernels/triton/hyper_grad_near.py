"""Gradients of keys and values: a program owns neighbouring keys and walks the rows near to them.

What was left for these keys by blocks, samples and sinks is added in a fixed order.
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
from efficient_attn.kernels.triton._hyper_index import places_by_key
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
def _hyper_grad_near_kernel(
    grad_k, grad_k_strides, grad_v, grad_v_strides,
    block_k, block_k_strides, block_v, block_v_strides, width,
    sample_k, sample_k_strides, sample_v, sample_v_strides, num_splits, drawn_order, drawn_starts,
    sink_k, sink_k_strides, sink_v, sink_v_strides,
    grad_out, grad_out_strides, delta, log2_lse, padded_queries,
    q, q_strides, k, k_strides, v, v_strides,
    key_order, key_rank, band_start, band_end, block_rows, block_first,
    sample_keys, sample_log_weight,
    num_q_heads, num_k_heads, num_queries, num_keys, num_levels, num_tiles, tile_rows,
    num_sets, sample_size, block_size, leaf_size, window, sinks, first_leaf, first_set, scale,
    num_blocks, HALVES: tl.constexpr, CAUSAL: tl.constexpr, BY_LEAF: tl.constexpr,
    WITH_LEAVES: tl.constexpr,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What neighbouring keys get from rows that they are near to, and from everywhere else."""
    program = tl.program_id(0)
    first_column = program % num_blocks * COLUMNS
    plane = program // num_blocks
    sample, head = plane // num_k_heads, plane % num_k_heads
    group = num_q_heads // num_k_heads
    corner = num_keys - num_queries
    columns = first_column + tl.arange(0, COLUMNS)
    exists = columns < num_keys
    k_acc = tl.zeros((COLUMNS, BLOCK_QK), tl.float32)
    v_acc = tl.zeros((COLUMNS, BLOCK_V), tl.float32)
    if WITH_LEAVES:
        keys, values = of_sample(k, k_strides, sample), of_sample(v, v_strides, sample)
        k_tile = gather(keys, k_strides, head, columns, exists, DIM_QK, BLOCK_QK)
        v_tile = gather(values, v_strides, head, columns, exists, DIM_V, BLOCK_V)
        queries_of = of_sample(q, q_strides, sample)
        grads_of = of_sample(grad_out, grad_out_strides, sample)
        last_column = tl.minimum(first_column + COLUMNS, num_keys) - 1
        first = first_column
        if not CAUSAL:
            # The first leaf whose window reaches these keys.
            begin = first_leaf * leaf_size
            before = first_column - leaf_size - window - begin
            first = (
                begin + tl.where(before < 0, 0, tl.maximum(before, 0) // leaf_size + 1) * leaf_size
            )
        end = ((last_column + window) // leaf_size + 1) * leaf_size
        first_query = tl.minimum(tl.maximum(first - corner, 0), num_queries)
        end_query = tl.maximum(tl.minimum(end - corner, num_queries), first_query)
        parts = tl.cdiv(end_query - first_query, ROWS)
        for index in tl.range(0, group * parts):
            q_head = head * group + index // parts
            queries = first_query + index % parts * ROWS + tl.arange(0, ROWS)
            inside = queries < end_query
            near_first, near_end = near_keys(
                queries + corner, num_keys, first_leaf, leaf_size, window, CAUSAL
            )
            counts = in_band(columns[:, None], near_first[None, :], near_end[None, :])
            q_tile = gather(queries_of, q_strides, q_head, queries, inside, DIM_QK, BLOCK_QK)
            g_tile = gather(grads_of, grad_out_strides, q_head, queries, inside, DIM_V, BLOCK_V)
            statistics = (tl.cast(sample, tl.int64) * num_q_heads + q_head) * padded_queries
            row_lse = tl.load(log2_lse + statistics + queries, mask=inside, other=float("inf"))
            row_delta = tl.load(delta + statistics + queries, mask=inside, other=0.0)
            k_acc, v_acc = visit_rows(
                k_tile, v_tile, q_tile, g_tile, zero_or_ruled_out(counts), scale,
                row_lse, row_delta, k_acc, v_acc, grad_k is not None, grad_v is not None,
            )  # fmt: skip
        k_acc *= scale

    plane = tl.cast(plane, tl.int64)
    for level in tl.range(0, num_levels):
        ranks = key_rank + (plane * num_levels + level) * num_keys + columns
        ranks = tl.load(ranks, mask=exists, other=0)
        has, slots = key_slot(level, ranks, leaf_size, width, HALVES)
        has &= exists
        k_acc, v_acc = _added(
            k_acc, v_acc, block_k, block_k_strides, block_v, block_v_strides,
            sample, head, slots, has, DIM_QK, DIM_V,
        )  # fmt: skip
    drawn_starts += tl.cast(head, tl.int64) * (num_keys + 1) + columns
    starts = tl.load(drawn_starts, mask=exists, other=0)
    counts = tl.load(drawn_starts + 1, mask=exists, other=0) - starts
    drawn_order += tl.cast(head, tl.int64) * num_sets * sample_size + starts
    for turn in tl.range(0, tl.max(counts, 0)):
        has = turn < counts
        drawn = tl.load(drawn_order + turn, mask=has, other=0)
        number, place = drawn // sample_size, drawn % sample_size + sinks
        for split in tl.range(0, num_splits):
            slots = (split * num_sets + number) * (sinks + sample_size) + place
            k_acc, v_acc = _added(
                k_acc, v_acc, sample_k, sample_k_strides, sample_v, sample_v_strides,
                sample, head, slots, has, DIM_QK, DIM_V,
            )  # fmt: skip
    if first_column < sinks:
        k_acc, v_acc = _added(
            k_acc, v_acc, sink_k, sink_k_strides, sink_v, sink_v_strides,
            sample, head, columns, columns < sinks, DIM_QK, DIM_V,
        )  # fmt: skip
    if grad_k is not None:
        outs = of_sample(grad_k, grad_k_strides, sample)
        scatter(outs, grad_k_strides, head, columns, exists, k_acc, DIM_QK)
    if grad_v is not None:
        outs = of_sample(grad_v, grad_v_strides, sample)
        scatter(outs, grad_v_strides, head, columns, exists, v_acc, DIM_V)


@triton.jit
def _added(
    k_acc, v_acc, more_k, k_strides, more_v, v_strides, sample, head, slots, has,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Both sums with what was left for these keys; None is nothing."""
    if more_k is not None:
        more = gather(
            of_sample(more_k, k_strides, sample),
            k_strides,
            head,
            slots,
            has,
            DIM_QK,
            k_acc.shape[1],
        )
        k_acc += more.to(tl.float32)
    if more_v is not None:
        more = gather(
            of_sample(more_v, v_strides, sample), v_strides, head, slots, has, DIM_V, v_acc.shape[1]
        )
        v_acc += more.to(tl.float32)
    return k_acc, v_acc


def launch(
    problem: HyperProblem,
    shared: dict[str, Any],
    grads: KeyGradients,
    of_blocks: KeyGradients,
    of_samples: KeyGradients,
    num_splits: int,
) -> None:
    """Fill in ``grads``."""
    tile = problem.tile("hyper_grad_key_value")
    order, starts = places_by_key(problem.plan)
    num_blocks = triton.cdiv(problem.num_keys, tile.columns)
    num_samples = num_splits * problem.plan.sample_keys.shape[1]
    of_sinks = of_samples.first_places(num_samples, problem.plan.sinks)
    problem.launch(
        _hyper_grad_near_kernel,
        problem.num_planes * num_blocks,
        tile,
        width=problem.key_width(),
        num_splits=num_splits,
        drawn_order=order,
        drawn_starts=starts,
        num_blocks=num_blocks,
        WITH_LEAVES=problem.has_leaves,
        **grads.arguments("grad"),
        **of_blocks.arguments("block"),
        **of_samples.arguments("sample"),
        **of_sinks.arguments("sink"),
        **shared,
    )
