"""Gradient of an additive bias of any broadcast shape, without a buffer of the expanded shape.

A program owns a tile of the bias as it is stored and adds up, in a fixed order, whatever shares it:
samples, heads, and blocks of queries or keys along a broadcast dimension. Where the bias is so
small that few programs would run, each splits its share with others, whose partial sums are added
at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_attn.kernels.triton import configs
from efficient_attn.kernels.triton._arguments import NOT_SPECIALIZED, Problem
from efficient_attn.kernels.triton._tile import (
    head_read,
    load_tile,
    plane,
    recomputed_weights,
    row_statistics,
    span,
    tile_pointers,
    used_keys,
)

_COUNTS = ("own_samples", "own_heads", "num_splits", "num_samples")


@triton.jit(do_not_specialize=NOT_SPECIALIZED + _COUNTS)
def _bias_kernel(
    grad_bias, own_samples, own_heads, num_splits, num_samples,
    grad_out, grad_out_strides, delta, log2_lse, padded_queries,
    q, q_strides, k, k_strides, v, v_strides, bias, bias_strides,
    q_to_k, q_to_k_stride, q_to_v, q_to_v_stride, key_lengths, cu_seqlens_q, cu_seqlens_k,
    num_q_heads, num_k_heads, num_v_heads, num_queries, num_keys,
    window_left, window_right, scale, softcap,
    SHARED_ROWS: tl.constexpr, SHARED_COLUMNS: tl.constexpr,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(num_queries, ROWS)
    column_blocks = tl.cdiv(num_keys, COLUMNS)
    own_row_blocks = 1 if SHARED_ROWS else row_blocks
    own_column_blocks = 1 if SHARED_COLUMNS else column_blocks
    program = tl.program_id(0)
    own_column_block = program % own_column_blocks
    program //= own_column_blocks
    own_row_block = program % own_row_blocks
    program //= own_row_blocks
    own_head = program % own_heads
    program //= own_heads
    own_sample = program % own_samples
    split = program // own_samples

    shared_column_blocks = column_blocks // own_column_blocks
    shared_blocks = shared_column_blocks * (row_blocks // own_row_blocks)
    shared_heads = num_q_heads // own_heads
    items = tl.cast(shared_blocks, tl.int64) * (shared_heads * (num_samples // own_samples))
    items_per_split = tl.cdiv(items, num_splits)
    first_item = split * items_per_split
    last_item = tl.minimum(first_item + items_per_split, items)
    if not SHARED_ROWS and not SHARED_COLUMNS and key_lengths is None:
        # Every item is the same tile of scores, which nobody may see.
        row = own_row_block * ROWS
        last_row = tl.minimum(row + ROWS, num_queries) - 1
        diagonal = num_keys - num_queries
        begin, _, _, _, end = span(
            row, last_row, diagonal, window_left, window_right, num_keys, COLUMNS
        )
        column = own_column_block * COLUMNS
        last_item = tl.where((column >= begin) & (column < end), last_item, first_item)

    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for item in range(first_item, last_item):
        block = tl.cast(item % shared_blocks, tl.int32)
        head_and_sample = tl.cast(item // shared_blocks, tl.int32)
        first_column = (own_column_block + block % shared_column_blocks) * COLUMNS
        first_row = (own_row_block + block // shared_column_blocks) * ROWS
        head = own_head + head_and_sample % shared_heads
        sample = own_sample + head_and_sample // shared_heads
        rows = first_row + tl.arange(0, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        sample_keys = used_keys(sample, key_lengths, num_keys)

        queries = plane(q, q_strides, sample, head, 0)
        grads = plane(grad_out, grad_out_strides, sample, head, 0)
        k_head = head_read(q_to_k, q_to_k_stride, sample, head, num_q_heads, num_k_heads)
        v_head = head_read(q_to_v, q_to_v_stride, sample, head, num_q_heads, num_v_heads)
        keys = plane(k, k_strides, sample, k_head, 0)
        values = plane(v, v_strides, sample, v_head, 0)
        q_pointers = tile_pointers(queries, q_strides, first_row, ROWS, BLOCK_QK)
        q_tile = load_tile(q_pointers, first_row, num_queries, DIM_QK, True)
        g_pointers = tile_pointers(grads, grad_out_strides, first_row, ROWS, BLOCK_V)
        g_tile = load_tile(g_pointers, first_row, num_queries, DIM_V, True)
        k_pointers = tile_pointers(keys, k_strides, first_column, COLUMNS, BLOCK_QK)
        k_tile = load_tile(k_pointers, first_column, sample_keys, DIM_QK, True)
        v_pointers = tile_pointers(values, v_strides, first_column, COLUMNS, BLOCK_V)
        v_tile = load_tile(v_pointers, first_column, sample_keys, DIM_V, True)
        deltas, lses = row_statistics(
            delta, log2_lse, sample, head, 0, num_q_heads, padded_queries, cu_seqlens_q
        )
        row_delta = tl.load(deltas + rows)
        row_lse = tl.load(lses + rows)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        weights, _ = recomputed_weights(
            products,
            row_lse[:, None],
            rows[:, None],
            columns[None, :],
            plane(bias, bias_strides, sample, head, 0),
            bias_strides,
            num_queries,
            sample_keys,
            sample_keys - num_queries,
            window_left,
            window_right,
            scale,
            softcap,
            True,
            True,
        )
        grad_weights = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
        acc += weights * (grad_weights - row_delta[:, None])

    own_rows = 1 if SHARED_ROWS else num_queries
    own_columns = 1 if SHARED_COLUMNS else num_keys
    head_and_sampleindex = (
        tl.cast(split, tl.int64) * own_samples + own_sample
    ) * own_heads + own_head
    target = grad_bias + head_and_sampleindex * own_rows * own_columns
    rows = own_row_block * ROWS + tl.arange(0, ROWS)
    columns = own_column_block * COLUMNS + tl.arange(0, COLUMNS)
    element = grad_bias.dtype.element_ty
    if SHARED_ROWS and SHARED_COLUMNS:
        tl.store(target, tl.sum(tl.sum(acc, 1), 0).to(element))
    elif SHARED_ROWS:
        tl.store(target + columns, tl.sum(acc, 0).to(element), mask=columns < num_keys)
    elif SHARED_COLUMNS:
        tl.store(target + rows, tl.sum(acc, 1).to(element), mask=rows < num_queries)
    else:
        inside = (rows < num_queries)[:, None] & (columns < num_keys)[None, :]
        offsets = rows.to(tl.int64)[:, None] * num_keys + columns[None, :]
        tl.store(target + offsets, acc.to(element), mask=inside)


def launch(problem: Problem, arguments: dict[str, Any]) -> Tensor:
    """The gradient of ``problem.bias`` in its own shape, contiguous.

    Args:
        problem: The call.
        arguments: What every backward kernel takes, delta included.
    """
    bias = problem.bias
    own_samples, own_heads, own_rows, own_columns = (1,) * (4 - bias.dim()) + bias.shape
    shared_rows = own_rows == 1
    shared_columns = own_columns == 1
    tile = problem.tile("grad_bias")
    row_blocks = triton.cdiv(problem.num_queries, tile.rows)
    column_blocks = triton.cdiv(problem.num_keys, tile.columns)
    tiles = own_samples * own_heads
    tiles *= (1 if shared_rows else row_blocks) * (1 if shared_columns else column_blocks)
    all_tiles = problem.num_samples * problem.num_q_heads * row_blocks * column_blocks
    if tiles == 0 or all_tiles == 0:
        return bias.new_zeros(bias.shape)
    wanted = configs.programs_wanted(configs.architecture(bias.device))
    num_splits = max(1, min(wanted // tiles, all_tiles // tiles))

    dtype = bias.dtype if num_splits == 1 else torch.float32
    partial = bias.new_empty(num_splits, *bias.shape, dtype=dtype)
    problem.launch(
        _bias_kernel,
        num_splits * tiles,
        tile,
        grad_bias=partial,
        own_samples=own_samples,
        own_heads=own_heads,
        num_splits=num_splits,
        num_samples=problem.num_samples,
        SHARED_ROWS=shared_rows,
        SHARED_COLUMNS=shared_columns,
        **arguments,
    )
    return partial[0] if num_splits == 1 else partial.sum(0).to(bias.dtype)
