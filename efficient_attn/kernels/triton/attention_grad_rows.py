"""What the backward kernels need to know about every row of scores."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_attn.kernels.triton._arguments import NOT_SPECIALIZED, Problem
from efficient_attn.kernels.triton._tile import (
    LOG2E,
    ROW_PADDING,
    assignment,
    extent,
    load_tile,
    plane,
    row_offsets,
    row_statistics,
    tile_pointers,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _row_kernel(
    delta, log2_lse, padded_queries, grad_lse, grad_lse_strides, lse,
    out, out_strides, grad_out, grad_out_strides,
    cu_seqlens_q, num_q_heads, num_queries, num_blocks,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What the gradients of a row of scores need, padded with values that make them zero.

    ``delta = rowsum(grad_out * out) - grad_lse`` and the log-sum-exp in units of log 2, +inf where
    there is nothing to attend to, so that every weight recomputed from it is 0.
    """
    sample, head, block = assignment(num_blocks, num_q_heads, num_q_heads)
    first_query, num_queries, _, _ = extent(sample, cu_seqlens_q, cu_seqlens_q, num_queries, 0)
    first_row = block * ROWS
    if first_row >= tl.cdiv(num_queries, ROW_PADDING) * ROW_PADDING:
        return
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < num_queries
    outs = plane(out, out_strides, sample, head, first_query)
    grads = plane(grad_out, grad_out_strides, sample, head, first_query)
    o_pointers = tile_pointers(outs, out_strides, first_row, ROWS, BLOCK_V)
    g_pointers = tile_pointers(grads, grad_out_strides, first_row, ROWS, BLOCK_V)
    o = load_tile(o_pointers, first_row, num_queries, DIM_V, True)
    g = load_tile(g_pointers, first_row, num_queries, DIM_V, True)
    row_delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if grad_lse is not None:
        pointers = plane(grad_lse, grad_lse_strides, sample, head, first_query)
        pointers += rows.to(tl.int64) * grad_lse_strides[2] * grad_lse_strides[4]
        row_delta -= tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    offsets = row_offsets(sample, head, rows, first_query, num_queries, num_q_heads, cu_seqlens_q)
    row_lse = tl.load(lse + offsets, mask=inside, other=float("-inf"))
    # The log-sum-exp of such a row is constant, whatever gradient it was sent.
    nothing = row_lse == float("-inf")
    deltas, lses = row_statistics(
        delta, log2_lse, sample, head, first_query, num_q_heads, padded_queries, cu_seqlens_q
    )
    tl.store(deltas + rows, tl.where(nothing, 0.0, row_delta))
    tl.store(lses + rows, tl.where(nothing, float("inf"), row_lse * LOG2E))


def launch(
    problem: Problem,
    arguments: dict[str, Any],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> dict[str, Any]:
    """Compute the statistics; returns them as the further arguments of every backward kernel."""
    tile = problem.tile("rows")
    padding = ROW_PADDING.value
    if problem.packed:
        padded_queries = problem.query.shape[0] + problem.num_samples * padding
        shape = (problem.num_q_heads, padded_queries)
    else:
        padded_queries = triton.cdiv(problem.num_queries, padding) * padding
        shape = (problem.num_samples, problem.num_q_heads, padded_queries)
    delta, log2_lse = (torch.empty(shape, dtype=torch.float32, device=lse.device) for _ in range(2))
    gradient = {"grad_out": grad_out, "grad_out_strides": problem.strides(grad_out)}
    statistics = {"delta": delta, "log2_lse": log2_lse, "padded_queries": padded_queries}
    num_blocks = triton.cdiv(problem.num_queries, padding) * (padding // tile.rows)
    grid = problem.num_samples * problem.num_q_heads * num_blocks
    shared = ("cu_seqlens_q", "num_q_heads", "num_queries", "DIM_V", "BLOCK_V")
    problem.launch(
        _row_kernel,
        grid,
        tile,
        grad_lse=grad_lse,
        grad_lse_strides=None if grad_lse is None else problem.strides(grad_lse.unsqueeze(-1)),
        lse=lse.contiguous(),
        out=out,
        out_strides=problem.strides(out),
        num_blocks=num_blocks,
        **gradient,
        **statistics,
        **{name: arguments[name] for name in shared},
    )
    return gradient | statistics
