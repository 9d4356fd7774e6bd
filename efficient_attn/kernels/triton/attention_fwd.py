"""Flash-attention forward for any head map, dense and packed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_attn.kernels.triton._arguments import NOT_SPECIALIZED, Problem, refusals
from efficient_attn.kernels.triton._tile import (
    LN2,
    LOG2E,
    assignment,
    extent,
    head_read,
    is_visible,
    load_bias,
    load_tile,
    log2_scores,
    plane,
    row_offsets,
    span,
    store_tile,
    tile_pointers,
    used_keys,
)

__all__ = ["forward", "forward_varlen", "refusals"]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _forward_kernel(
    out, out_strides, lse,
    q, q_strides, k, k_strides, v, v_strides, bias, bias_strides,
    q_to_k, q_to_k_stride, q_to_v, q_to_v_stride, key_lengths, cu_seqlens_q, cu_seqlens_k,
    num_q_heads, num_k_heads, num_v_heads, num_queries, num_keys,
    window_left, window_right, scale, softcap,
    num_blocks, heads_together, FOLD_SCALE: tl.constexpr,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample, head, block = assignment(num_blocks, num_q_heads, heads_together)
    first_query, num_queries, first_key, num_keys = extent(
        sample, cu_seqlens_q, cu_seqlens_k, num_queries, num_keys
    )
    num_keys = used_keys(sample, key_lengths, num_keys)
    # Under a causal mask the last block is the longest, and the longest should start first.
    first_row = (num_blocks - 1 - block) * ROWS
    if first_row >= num_queries:
        return
    rows = first_row + tl.arange(0, ROWS)
    queries = plane(q, q_strides, sample, head, first_query)
    k_head = head_read(q_to_k, q_to_k_stride, sample, head, num_q_heads, num_k_heads)
    v_head = head_read(q_to_v, q_to_v_stride, sample, head, num_q_heads, num_v_heads)
    keys = plane(k, k_strides, sample, k_head, first_key)
    values = plane(v, v_strides, sample, v_head, first_key)
    if bias is not None:
        bias = plane(bias, bias_strides, sample, head, 0)

    q_pointers = tile_pointers(queries, q_strides, first_row, ROWS, BLOCK_QK)
    q_tile = load_tile(q_pointers, first_row, num_queries, DIM_QK, True)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
    log2_scale = scale * LOG2E
    diagonal = num_keys - num_queries
    last_row = tl.minimum(first_row + ROWS, num_queries) - 1
    begin, left_end, full_begin, full_end, end = span(
        first_row, last_row, diagonal, window_left, window_right, num_keys, COLUMNS
    )
    # The left edge of the window, the interior that carries no mask, the right edge.
    for part in tl.static_range(3):
        if part > 0 or window_left is not None:
            part_begin = begin if part == 0 else full_begin if part == 1 else full_end
            part_end = left_end if part == 0 else full_end if part == 1 else end
            for start in tl.range(part_begin, part_end, COLUMNS, disable_licm=part != 1):
                start = tl.multiple_of(start, COLUMNS)
                columns = start + tl.arange(0, COLUMNS)
                k_pointers = tile_pointers(keys, k_strides, start, COLUMNS, BLOCK_QK)
                k_tile = load_tile(k_pointers, start, num_keys, DIM_QK, part != 1)
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                if FOLD_SCALE and part == 1:
                    # One multiply-add per score: the exponent takes the scale along.
                    new_max = tl.maximum(row_max, tl.max(scores, 1) * log2_scale)
                    anchor = new_max
                    scores = scores * log2_scale - anchor[:, None]
                else:
                    scores = log2_scores(scores, scale, softcap)
                    if bias is not None:
                        scores += load_bias(
                            bias,
                            bias_strides,
                            rows[:, None],
                            columns[None, :],
                            num_queries,
                            num_keys,
                            part != 1,
                        )
                    if part != 1:
                        visible = is_visible(
                            rows[:, None],
                            columns[None, :],
                            diagonal,
                            window_left,
                            window_right,
                            num_keys,
                        )
                        scores = tl.where(visible, scores, float("-inf"))
                    new_max = tl.maximum(row_max, tl.max(scores, 1))
                    # A row that has seen nothing yet must not subtract -inf from -inf.
                    anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
                    scores -= anchor[:, None]
                weights = tl.exp2(scores)
                decay = tl.exp2(row_max - anchor)
                row_max = new_max
                row_sum = row_sum * decay + tl.sum(weights, 1)
                v_pointers = tile_pointers(values, v_strides, start, COLUMNS, BLOCK_V)
                v_tile = load_tile(v_pointers, start, num_keys, DIM_V, part != 1)
                acc = acc * decay[:, None]
                acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")

    # A row that saw nothing has sum 0 and maximum -inf: out 0, lse -inf.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc * (1.0 / row_sum)[:, None]
    outs = plane(out, out_strides, sample, head, first_query)
    out_pointers = tile_pointers(outs, out_strides, first_row, ROWS, BLOCK_V)
    store_tile(out_pointers, acc, first_row, num_queries, DIM_V)
    offsets = row_offsets(sample, head, rows, first_query, num_queries, num_q_heads, cu_seqlens_q)
    tl.store(lse + offsets, (row_max + tl.log2(row_sum)) * LN2, mask=rows < num_queries)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_to_k: Tensor | None,
    q_to_v: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    window_left: int | None,
    window_right: int | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attention over dense tensors.

    Shape:
        - query: ``(B, Hq, Nq, Dqk)``, key: ``(B, Hk, Nk, Dqk)``, value: ``(B, Hv, Nk, Dv)``
        - q_to_k, q_to_v: int32 ``(Hq,)`` or ``(B, Hq)``; None for even contiguous groups
        - bias: broadcastable to ``(B, Hq, Nq, Nk)``; key_lengths: ``(B,)``

    Returns:
        out ``(B, Hq, Nq, Dv)``, stored tokens-major, and lse ``(B, Hq, Nq)``, fp32, natural log.
    """
    problem = Problem(
        query, key, value, q_to_k, q_to_v, window_left, window_right, scale, softcap,
        bias=bias, key_lengths=key_lengths,
    )  # fmt: skip
    out = problem.allocate(query, value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    _launch(problem, out, lse)
    return out, lse


def forward_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_to_k: Tensor | None,
    q_to_v: Tensor | None,
    window_left: int | None,
    window_right: int | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attention over packed sequences.

    Shape:
        - query: ``(Tq, Hq, Dqk)``, key: ``(Tk, Hk, Dqk)``, value: ``(Tk, Hv, Dv)``
        - cu_seqlens_q, cu_seqlens_k: ``(sequences + 1,)``, integers, beginning with 0
        - q_to_k, q_to_v: int32 ``(Hq,)`` or ``(sequences, Hq)``; None for even contiguous groups

    Returns:
        out ``(Tq, Hq, Dv)`` and lse ``(Tq, Hq)``, fp32, natural log. A token that belongs to no
        sequence gets zeros and -inf.
    """
    problem = Problem(
        query, key, value, q_to_k, q_to_v, window_left, window_right, scale, softcap,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    out = problem.allocate(query, value.shape[-1])
    lse = query.new_full(query.shape[:-1], float("-inf"), dtype=torch.float32)
    _launch(problem, out, lse)
    return out, lse


def _launch(problem: Problem, out: Tensor, lse: Tensor) -> None:
    tile = problem.tile("forward")
    num_blocks = triton.cdiv(problem.num_queries, tile.rows)
    grid = problem.num_samples * problem.num_q_heads * num_blocks
    problem.launch(
        _forward_kernel,
        grid,
        tile,
        out=out,
        out_strides=problem.strides(out),
        lse=lse,
        num_blocks=num_blocks,
        heads_together=problem.heads_together(),
        FOLD_SCALE=problem.scale >= 0 and problem.softcap == 0 and problem.bias is None,
        **problem.kernel_arguments(),
    )
