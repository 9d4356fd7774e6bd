"""Gradient of the queries: a program owns a block of queries and walks the keys that it sees."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

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
def _query_kernel(
    grad_q, grad_q_strides, grad_out, grad_out_strides, delta, log2_lse, padded_queries,
    q, q_strides, k, k_strides, v, v_strides, bias, bias_strides,
    q_to_k, q_to_k_stride, q_to_v, q_to_v_stride, key_lengths, cu_seqlens_q, cu_seqlens_k,
    num_q_heads, num_k_heads, num_v_heads, num_queries, num_keys,
    window_left, window_right, scale, softcap,
    num_blocks, heads_together,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample, head, block = assignment(num_blocks, num_q_heads, heads_together)
    first_query, num_queries, first_key, num_keys = extent(
        sample, cu_seqlens_q, cu_seqlens_k, num_queries, num_keys
    )
    num_keys = used_keys(sample, key_lengths, num_keys)
    first_row = (num_blocks - 1 - block) * ROWS
    if first_row >= num_queries:
        return
    rows = first_row + tl.arange(0, ROWS)
    queries = plane(q, q_strides, sample, head, first_query)
    grads = plane(grad_out, grad_out_strides, sample, head, first_query)
    k_head = head_read(q_to_k, q_to_k_stride, sample, head, num_q_heads, num_k_heads)
    v_head = head_read(q_to_v, q_to_v_stride, sample, head, num_q_heads, num_v_heads)
    keys = plane(k, k_strides, sample, k_head, first_key)
    values = plane(v, v_strides, sample, v_head, first_key)
    if bias is not None:
        bias = plane(bias, bias_strides, sample, head, 0)

    deltas, lses = row_statistics(
        delta, log2_lse, sample, head, first_query, num_q_heads, padded_queries, cu_seqlens_q
    )
    row_delta = tl.load(deltas + rows)
    row_lse = tl.load(lses + rows)
    q_pointers = tile_pointers(queries, q_strides, first_row, ROWS, BLOCK_QK)
    g_pointers = tile_pointers(grads, grad_out_strides, first_row, ROWS, BLOCK_V)
    q_tile = load_tile(q_pointers, first_row, num_queries, DIM_QK, True)
    g_tile = load_tile(g_pointers, first_row, num_queries, DIM_V, True)
    acc = tl.zeros((ROWS, BLOCK_QK), tl.float32)
    diagonal = num_keys - num_queries
    last_row = tl.minimum(first_row + ROWS, num_queries) - 1
    begin, left_end, full_begin, full_end, end = span(
        first_row, last_row, diagonal, window_left, window_right, num_keys, COLUMNS
    )
    for part in tl.static_range(3):
        if part > 0 or window_left is not None:
            part_begin = begin if part == 0 else full_begin if part == 1 else full_end
            part_end = left_end if part == 0 else full_end if part == 1 else end
            for start in tl.range(part_begin, part_end, COLUMNS, disable_licm=part != 1):
                start = tl.multiple_of(start, COLUMNS)
                columns = start + tl.arange(0, COLUMNS)
                k_pointers = tile_pointers(keys, k_strides, start, COLUMNS, BLOCK_QK)
                k_tile = load_tile(k_pointers, start, num_keys, DIM_QK, part != 1)
                v_pointers = tile_pointers(values, v_strides, start, COLUMNS, BLOCK_V)
                v_tile = load_tile(v_pointers, start, num_keys, DIM_V, part != 1)
                products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                weights, slope = recomputed_weights(
                    products,
                    row_lse[:, None],
                    rows[:, None],
                    columns[None, :],
                    bias,
                    bias_strides,
                    num_queries,
                    num_keys,
                    diagonal,
                    window_left,
                    window_right,
                    scale,
                    softcap,
                    part != 1,
                    part != 1,
                )
                grad_weights = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
                grad_products = weights * (grad_weights - row_delta[:, None]) * slope
                acc = tl.dot(grad_products.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    outs = plane(grad_q, grad_q_strides, sample, head, first_query)
    pointers = tile_pointers(outs, grad_q_strides, first_row, ROWS, BLOCK_QK)
    store_tile(pointers, acc * scale, first_row, num_queries, DIM_QK)


def launch(problem: Problem, arguments: dict[str, Any], grad_query: Tensor) -> None:
    """Fill in ``grad_query``."""
    tile = problem.tile("grad_query")
    num_blocks = triton.cdiv(problem.num_queries, tile.rows)
    grid = problem.num_samples * problem.num_q_heads * num_blocks
    problem.launch(
        _query_kernel,
        grid,
        tile,
        grad_q=grad_query,
        grad_q_strides=problem.strides(grad_query),
        num_blocks=num_blocks,
        heads_together=problem.heads_together(),
        **arguments,
    )
