"""Gradients of keys and values: a program owns a block of keys and walks the heads that read it.

Every sum runs in the order of the inverse head map, in registers, so nothing is expanded to the
query heads and results are repeatable to the bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from efficient_attn.head_map import HeadGroups, head_groups
from efficient_attn.kernels.triton import configs
from efficient_attn.kernels.triton._arguments import NOT_SPECIALIZED, Problem
from efficient_attn.kernels.triton._tile import (
    assignment,
    extent,
    head_read,
    load_tile,
    plane,
    recomputed_weights,
    row_statistics,
    span,
    store_tile,
    tile_pointers,
    used_keys,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _key_value_kernel(
    grad_k, grad_k_strides, grad_v, grad_v_strides,
    starts, starts_stride, members, members_stride, num_groups,
    grad_out, grad_out_strides, delta, log2_lse, padded_queries,
    q, q_strides, k, k_strides, v, v_strides, bias, bias_strides,
    q_to_k, q_to_k_stride, q_to_v, q_to_v_stride, key_lengths, cu_seqlens_q, cu_seqlens_k,
    num_q_heads, num_k_heads, num_v_heads, num_queries, num_keys,
    window_left, window_right, scale, softcap,
    num_blocks, heads_together,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys, of values, or of both where one group shares them."""
    sample, group, block = assignment(num_blocks, num_groups, heads_together)
    first_query, num_queries, first_key, stored_keys = extent(
        sample, cu_seqlens_q, cu_seqlens_k, num_queries, num_keys
    )
    num_keys = used_keys(sample, key_lengths, stored_keys)
    first_column = block * COLUMNS
    if first_column >= stored_keys:
        return
    columns = first_column + tl.arange(0, COLUMNS)

    if grad_k is not None:
        keys = plane(k, k_strides, sample, group, first_key)
        pointers = tile_pointers(keys, k_strides, first_column, COLUMNS, BLOCK_QK)
        k_tile = load_tile(pointers, first_column, num_keys, DIM_QK, True)
        k_acc = tl.zeros((COLUMNS, BLOCK_QK), tl.float32)
    if grad_v is not None:
        values = plane(v, v_strides, sample, group, first_key)
        pointers = tile_pointers(values, v_strides, first_column, COLUMNS, BLOCK_V)
        v_tile = load_tile(pointers, first_column, num_keys, DIM_V, True)
        v_acc = tl.zeros((COLUMNS, BLOCK_V), tl.float32)

    if members is None:
        first_slot = group * (num_q_heads // num_groups)
        last_slot = first_slot + num_q_heads // num_groups
    else:
        starts += tl.cast(sample, tl.int64) * starts_stride + group
        members += tl.cast(sample, tl.int64) * members_stride
        first_slot = tl.load(starts)
        last_slot = tl.load(starts + 1)

    # Turned round: which queries see a key. A block without keys that count is seen by none.
    diagonal = num_keys - num_queries
    last_column = tl.minimum(first_column + COLUMNS, num_keys) - 1
    begin, left_end, full_begin, full_end, end = span(
        first_column,
        last_column,
        -diagonal,
        window_right,
        window_left,
        tl.where(first_column < num_keys, num_queries, 0),
        ROWS,
    )
    for slot in tl.range(first_slot, last_slot, disable_licm=True):
        head = slot
        if members is not None:
            head = tl.load(members + slot)
            tl.assume(head >= 0)
        if grad_k is None:
            k_head = head_read(q_to_k, q_to_k_stride, sample, head, num_q_heads, num_k_heads)
            keys = plane(k, k_strides, sample, k_head, first_key)
            pointers = tile_pointers(keys, k_strides, first_column, COLUMNS, BLOCK_QK)
            k_tile = load_tile(pointers, first_column, num_keys, DIM_QK, True)
        if grad_v is None:
            v_head = head_read(q_to_v, q_to_v_stride, sample, head, num_q_heads, num_v_heads)
            values = plane(v, v_strides, sample, v_head, first_key)
            pointers = tile_pointers(values, v_strides, first_column, COLUMNS, BLOCK_V)
            v_tile = load_tile(pointers, first_column, num_keys, DIM_V, True)
        queries = plane(q, q_strides, sample, head, first_query)
        grads = plane(grad_out, grad_out_strides, sample, head, first_query)
        deltas, lses = row_statistics(
            delta, log2_lse, sample, head, first_query, num_q_heads, padded_queries, cu_seqlens_q
        )
        head_bias = bias
        if bias is not None:
            head_bias = plane(bias, bias_strides, sample, head, 0)
        for part in tl.static_range(3):
            # Without a left limit the interior runs to the end: rows beyond it have no weight.
            if (part != 0 or window_right is not None) and (part != 2 or window_left is not None):
                part_begin = begin if part == 0 else full_begin if part == 1 else full_end
                part_end = left_end if part == 0 else end
                if part == 1 and window_left is not None:
                    part_end = full_end
                for start in tl.range(part_begin, part_end, ROWS, disable_licm=part != 1):
                    start = tl.multiple_of(start, ROWS)
                    rows = start + tl.arange(0, ROWS)
                    q_pointers = tile_pointers(queries, q_strides, start, ROWS, BLOCK_QK)
                    q_tile = load_tile(q_pointers, start, num_queries, DIM_QK, True)
                    row_lse = tl.load(lses + rows)
                    products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                    weights, slope = recomputed_weights(
                        products,
                        row_lse[None, :],
                        rows[None, :],
                        columns[:, None],
                        head_bias,
                        bias_strides,
                        num_queries,
                        num_keys,
                        diagonal,
                        window_left,
                        window_right,
                        scale,
                        softcap,
                        part != 1,
                        True,
                    )
                    g_pointers = tile_pointers(grads, grad_out_strides, start, ROWS, BLOCK_V)
                    g_tile = load_tile(g_pointers, start, num_queries, DIM_V, True)
                    if grad_v is not None:
                        v_acc = tl.dot(
                            weights.to(g_tile.dtype), g_tile, v_acc, input_precision="ieee"
                        )
                    if grad_k is not None:
                        row_delta = tl.load(deltas + rows)
                        grad_weights = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
                        grad_products = weights * (grad_weights - row_delta[None, :]) * slope
                        k_acc = tl.dot(
                            grad_products.to(q_tile.dtype), q_tile, k_acc, input_precision="ieee"
                        )

    if grad_k is not None:
        grad_keys = plane(grad_k, grad_k_strides, sample, group, first_key)
        k_acc *= scale
        if key_lengths is not None:
            # A key that does not count was computed on zeros; its gradient is zero.
            k_acc = tl.where((columns < num_keys)[:, None], k_acc, 0.0)
        pointers = tile_pointers(grad_keys, grad_k_strides, first_column, COLUMNS, BLOCK_QK)
        store_tile(pointers, k_acc, first_column, stored_keys, DIM_QK)
    if grad_v is not None:
        grad_values = plane(grad_v, grad_v_strides, sample, group, first_key)
        if key_lengths is not None:
            v_acc = tl.where((columns < num_keys)[:, None], v_acc, 0.0)
        pointers = tile_pointers(grad_values, grad_v_strides, first_column, COLUMNS, BLOCK_V)
        store_tile(pointers, v_acc, first_column, stored_keys, DIM_V)


def launch(
    problem: Problem, arguments: dict[str, Any], grad_key: Tensor, grad_value: Tensor
) -> None:
    """Fill in both gradients, at once where the same groups share keys and values."""
    key_groups = _groups(problem.q_to_k, problem.num_k_heads)
    head_dims = problem.query.shape[-1] + problem.value.shape[-1]
    if problem.same_map and head_dims <= configs.LARGEST_DIMS_TOGETHER:
        _launch(problem, arguments, key_groups, grad_key, grad_value)
        return
    value_groups = key_groups if problem.same_map else _groups(problem.q_to_v, problem.num_v_heads)
    _launch(problem, arguments, key_groups, grad_key, None)
    _launch(problem, arguments, value_groups, None, grad_value)


def _groups(index: Tensor | None, num_heads: int) -> HeadGroups | None:
    return None if index is None else head_groups(index, num_heads)


def _launch(
    problem: Problem,
    arguments: dict[str, Any],
    groups: HeadGroups | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> None:
    """Launch for both gradients, or for the one that is not None."""
    tile = problem.tile("grad_key_value")
    num_groups = problem.num_k_heads if grad_key is not None else problem.num_v_heads
    num_blocks = triton.cdiv(problem.num_keys, tile.columns)
    grid = problem.num_samples * num_groups * num_blocks
    starts, members = groups if groups is not None else (None, None)
    per_sample = starts is not None and starts.dim() == 2
    problem.launch(
        _key_value_kernel,
        grid,
        tile,
        grad_k=grad_key,
        grad_k_strides=None if grad_key is None else problem.strides(grad_key),
        grad_v=grad_value,
        grad_v_strides=None if grad_value is None else problem.strides(grad_value),
        starts=starts,
        starts_stride=num_groups + 1 if per_sample else 0,
        members=members,
        members_stride=problem.num_q_heads if per_sample else 0,
        num_groups=num_groups,
        num_blocks=num_blocks,
        heads_together=problem.groups_together(num_groups),
        **arguments,
    )
