"""Gradients of keys and values from samples: a program owns places of one sample.

Those are walked by the rows of a leaf or of a segment; sinks are like a sample of every leaf.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from efficient_attn.kernels.triton import configs
from efficient_attn.kernels.triton._hyper_arguments import (
    HYPER_NOT_SPECIALIZED,
    HyperProblem,
    KeyGradients,
)
from efficient_attn.kernels.triton._hyper_index import tiles_of_segments
from efficient_attn.kernels.triton._hyper_tile import (
    gather,
    in_band,
    near_keys,
    of_sample,
    scatter,
    visit_rows,
)


@triton.jit(do_not_specialize=HYPER_NOT_SPECIALIZED)
def _hyper_grad_sample_kernel(
    grad_k, grad_k_strides, grad_v, grad_v_strides, set_begin, set_end, num_splits,
    grad_out, grad_out_strides, delta, log2_lse, padded_queries,
    q, q_strides, k, k_strides, v, v_strides,
    key_order, key_rank, band_start, band_end, block_rows, block_first,
    sample_keys, sample_log_weight,
    num_q_heads, num_k_heads, num_queries, num_keys, num_levels, num_tiles, tile_rows,
    num_sets, sample_size, block_size, leaf_size, window, sinks, first_leaf, first_set, scale,
    num_blocks, HALVES: tl.constexpr, CAUSAL: tl.constexpr, BY_LEAF: tl.constexpr,
    WITH_BANDS: tl.constexpr,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What the rows of a leaf or a segment give to the far sinks and to the keys of its sample."""
    program = tl.program_id(0)
    block = program % num_blocks
    split = program // num_blocks % num_splits
    number = program // num_blocks // num_splits % num_sets
    plane = program // num_blocks // num_splits // num_sets
    sample, head = plane // num_k_heads, plane % num_k_heads
    group = num_q_heads // num_k_heads
    corner = num_keys - num_queries
    places = block * COLUMNS + tl.arange(0, COLUMNS)
    exists = places < sinks + sample_size
    drawn = exists & (places >= sinks)
    turns = places - sinks
    sample_keys += (tl.cast(head, tl.int64) * num_sets + number) * sample_size
    columns = tl.load(sample_keys + turns, mask=drawn, other=0)
    columns = tl.where(drawn, columns, tl.minimum(places, num_keys - 1))
    weights = sample_log_weight + tl.cast(number, tl.int64) * sample_size
    log_weights = tl.load(weights + turns, mask=drawn, other=float("-inf"))
    leaf = first_set + number
    parts = tl.cdiv(tile_rows, ROWS)
    begin = 0
    if BY_LEAF:
        near_first, near_end = near_keys(
            leaf * leaf_size, num_keys, tl.minimum(leaf, 0), leaf_size, window, CAUSAL
        )
        far = places < near_first
        if not CAUSAL:
            far |= places >= near_end
        log_weights = tl.where((places < sinks) & far, 0.0, log_weights)
        parts = tl.cdiv(leaf_size, ROWS)
        end = group * parts
    else:
        begin = tl.load(set_begin + number) * parts
        end = tl.load(set_end + number) * parts
    share = tl.cdiv(end - begin, num_splits)
    begin += split * share
    end = tl.minimum(end, begin + share)

    keys, values = of_sample(k, k_strides, sample), of_sample(v, v_strides, sample)
    k_tile = gather(keys, k_strides, head, columns, exists, DIM_QK, BLOCK_QK)
    v_tile = gather(values, v_strides, head, columns, exists, DIM_V, BLOCK_V)
    k_acc = tl.zeros((COLUMNS, BLOCK_QK), tl.float32)
    v_acc = tl.zeros((COLUMNS, BLOCK_V), tl.float32)
    queries_of, grads_of = (
        of_sample(q, q_strides, sample),
        of_sample(grad_out, grad_out_strides, sample),
    )
    plane = tl.cast(plane, tl.int64)
    for index in tl.range(begin, end):
        if BY_LEAF:
            in_leaf = index % parts * ROWS + tl.arange(0, ROWS)
            queries = leaf * leaf_size + in_leaf - corner
            inside = (in_leaf < leaf_size) & (queries >= 0) & (queries < num_queries)
            queries = tl.where(inside, queries, 0)
            rows = index // parts * num_queries + queries
            heads = head * group + index // parts + tl.zeros_like(queries)
        else:
            tile = index // parts
            row_places = index % parts * ROWS + tl.arange(0, ROWS)
            rows = tl.load(
                block_rows + (plane * num_tiles + tile) * tile_rows + row_places,
                mask=row_places < tile_rows,
                other=-1,
            )
            inside = rows >= 0
            rows = tl.maximum(rows, 0)
            heads, queries = head * group + rows // num_queries, rows % num_queries
        row_weights = log_weights[:, None]
        if WITH_BANDS:
            level = 0
            if not BY_LEAF:
                level = tl.load(block_first + plane * num_tiles + tile) // num_keys
            level_plane = plane * num_levels + level
            ranks = tl.load(key_rank + level_plane * num_keys + columns, mask=exists, other=0)
            bands = level_plane * (group * num_queries) + rows
            starts = tl.load(band_start + bands, mask=inside, other=0)
            ends = tl.load(band_end + bands, mask=inside, other=0)
            banned = drawn[:, None] & in_band(ranks[:, None], starts[None, :], ends[None, :])
            row_weights = tl.where(banned, float("-inf"), row_weights)
        q_tile = gather(queries_of, q_strides, heads, queries, inside, DIM_QK, BLOCK_QK)
        g_tile = gather(grads_of, grad_out_strides, heads, queries, inside, DIM_V, BLOCK_V)
        statistics = (tl.cast(sample, tl.int64) * num_q_heads + heads) * padded_queries + queries
        row_lse = tl.load(log2_lse + statistics, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + statistics, mask=inside, other=0.0)
        k_acc, v_acc = visit_rows(
            k_tile, v_tile, q_tile, g_tile, row_weights, scale,
            row_lse, row_delta, k_acc, v_acc, grad_k is not None, grad_v is not None,
        )  # fmt: skip
    slots = (split * num_sets + number) * (sinks + sample_size) + places
    if grad_k is not None:
        outs = of_sample(grad_k, grad_k_strides, sample)
        scatter(outs, grad_k_strides, head, slots, exists, k_acc * scale, DIM_QK)
    if grad_v is not None:
        outs = of_sample(grad_v, grad_v_strides, sample)
        scatter(outs, grad_v_strides, head, slots, exists, v_acc, DIM_V)


def launch(
    problem: HyperProblem, shared: dict[str, Any], like: KeyGradients
) -> tuple[KeyGradients, int]:
    """What the sinks and then the sampled keys of every sample get, and in how many parts."""
    tile = problem.tile("hyper_grad_key_value")
    set_begin, set_end = tiles_of_segments(problem.plan)
    num_sets, per_set = problem.plan.sample_keys.shape[1], problem.columns_per_sample
    num_blocks = triton.cdiv(per_set, tile.columns)
    num_splits = _splits(problem, num_sets * per_set, num_sets * num_blocks)
    grads = like.empty(num_splits * num_sets * per_set)
    problem.launch(
        _hyper_grad_sample_kernel,
        problem.num_planes * num_sets * num_splits * num_blocks,
        tile,
        set_begin=set_begin,
        set_end=set_end,
        num_splits=num_splits,
        num_blocks=num_blocks,
        WITH_BANDS=problem.num_levels > 0,
        **grads.arguments("grad"),
        **shared,
    )
    return grads, num_splits


def _splits(problem: HyperProblem, samples: int, programs: int) -> int:
    """In how many parts the rows of a sample are walked, where there are few samples.

    They fill the device, and leave no more behind than there are keys.
    """
    arch = configs.architecture(problem.query.device)
    wanted = configs.programs_wanted(arch) // max(problem.num_planes * programs, 1)
    return max(1, min(wanted, problem.num_keys // max(samples, 1)))
