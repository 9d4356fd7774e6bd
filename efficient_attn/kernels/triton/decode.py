"""Attention of a few tokens to a cache: split over the keys, for any head map, dense and paged.

A program reads one part of the keys of one key head and answers all rows of its tile; a second
kernel merges the parts in a fixed order. Latent attention is the same with values that are the
first columns of the keys: they are loaded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_attn.kernels.triton import _decode_plan
from efficient_attn.kernels.triton._decode_combine import combine_kernel
from efficient_attn.kernels.triton._decode_plan import NOT_SPECIALIZED, Plan
from efficient_attn.kernels.triton._decode_tile import (
    cached_length,
    cached_tile,
    even_rows,
    mapped_rows,
    pages_and_rows,
    row_pointers,
    split_size,
)
from efficient_attn.kernels.triton._tile import LN2, LOG2E, is_visible, log2_scores, span

latent_refusals = _decode_plan.latent_refusals


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _decode_kernel(
    out, out_strides, lse, split_stride,
    q, q_strides, q_tail, q_tail_strides, k, k_strides, v, v_strides,
    cache_lengths, block_table, block_table_stride,
    q_to_k, q_to_k_stride, q_to_v, q_to_v_stride,
    num_q_heads, num_k_heads, num_v_heads, num_queries, capacity,
    window_left, scale, softcap, num_tiles, num_splits, smallest_split, run,
    FOLD_SCALE: tl.constexpr, DIM_QK: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_V: tl.constexpr,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % num_tiles
    split = tl.program_id(0) // num_tiles % num_splits
    sample = tl.program_id(0) // num_tiles // num_splits
    num_keys = cached_length(cache_lengths, sample, capacity)
    diagonal = num_keys - num_queries
    begin, left_end, full_begin, full_end, end = span(
        0, num_queries - 1, diagonal, window_left, 0, num_keys, COLUMNS
    )
    size = split_size(begin, end, num_splits, smallest_split, COLUMNS)
    first_key = begin + split * size
    last_key = tl.minimum(first_key + size, end)
    # A sequence with nothing to see still has an output, and its first part says so.
    if (split > 0) & (first_key >= end):
        return
    if HEADS is None:
        k_head, v_head, heads, tokens, slots, used = even_rows(
            tile, run, num_q_heads, num_k_heads, num_v_heads, num_queries, ROWS
        )
    else:
        k_head, v_head, heads, tokens, slots, used = mapped_rows(
            tile, q_to_k, q_to_k_stride, q_to_v, q_to_v_stride, sample,
            num_q_heads, num_k_heads, num_v_heads, num_queries, ROWS, HEADS,
        )  # fmt: skip
        if tl.sum(used.to(tl.int32), 0) == 0:
            return

    # Keys are one block of columns, or two: a width of 576 is 512 and 64.
    columns = tl.arange(0, BLOCK_QK)
    k_inside = columns < DIM_QK
    q_pointers = row_pointers(q, q_strides, sample, heads, tokens, columns)
    q_tile = tl.load(q_pointers, mask=used[:, None] & k_inside[None, :], other=0.0)
    k += tl.cast(k_head, tl.int64) * k_strides[1] * k_strides[4]
    k_columns = columns.to(tl.int64) * k_strides[3]
    if q_tail is not None:
        columns = tl.arange(0, BLOCK_TAIL)
        tail_columns = (BLOCK_QK + columns).to(tl.int64) * k_strides[3]
        tail_inside = BLOCK_QK + columns < DIM_QK
        q_pointers = row_pointers(q_tail, q_tail_strides, sample, heads, tokens, columns)
        q_tail_tile = tl.load(q_pointers, mask=used[:, None] & tail_inside[None, :], other=0.0)
    # Values are those of SLOTS heads side by side, of which each row wants one.
    columns = tl.arange(0, SLOTS * BLOCK_V)
    v_columns = (columns % BLOCK_V).to(tl.int64)
    v_slots = columns // BLOCK_V
    v_inside = columns % BLOCK_V < DIM_V
    if v is not None:
        v += tl.cast(v_head, tl.int64) * v_strides[1] * v_strides[4]
        v_columns *= v_strides[3]
        if SLOTS > 1:
            v_columns += v_slots.to(tl.int64) * v_strides[1] * v_strides[4]
            v_inside &= v_head + v_slots < num_v_heads
    if block_table is not None:
        block_table += tl.cast(sample, tl.int64) * block_table_stride

    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, SLOTS * BLOCK_V), tl.float32)
    log2_scale = scale * LOG2E
    # An accumulator that takes half of the registers leaves none to keep addresses in.
    CROWDED: tl.constexpr = ROWS * SLOTS * BLOCK_V >= 64 * 512
    # The left edge of the window, the interior that carries no mask, the right edge.
    for part in tl.static_range(3):
        if part > 0 or window_left is not None:
            part_begin = begin if part == 0 else full_begin if part == 1 else full_end
            part_end = left_end if part == 0 else full_end if part == 1 else end
            part_begin = tl.maximum(part_begin, first_key)
            part_end = tl.minimum(part_end, last_key)
            for start in tl.range(part_begin, part_end, COLUMNS, disable_licm=part != 1 or CROWDED):
                start = tl.multiple_of(start, COLUMNS)
                keys = start + tl.arange(0, COLUMNS)
                inside = keys < num_keys
                if part == 0:
                    inside &= keys >= diagonal - window_left
                pages, rows = pages_and_rows(
                    sample, block_table, start, inside, part != 1, COLUMNS, PAGE_SIZE
                )
                k_tile = cached_tile(
                    k, k_strides, pages, rows, k_columns, inside, k_inside,
                    part != 1, DIM_QK < BLOCK_QK,
                )  # fmt: skip
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                if q_tail is not None:
                    tail = cached_tile(
                        k, k_strides, pages, rows, tail_columns, inside, tail_inside,
                        part != 1, DIM_QK < BLOCK_QK + BLOCK_TAIL,
                    )  # fmt: skip
                    scores = tl.dot(q_tail_tile, tl.trans(tail), scores, input_precision="ieee")
                if FOLD_SCALE and part == 1:
                    # One multiply-add per score: the exponent takes the scale along.
                    new_max = tl.maximum(row_max, tl.max(scores, 1) * log2_scale)
                    anchor = new_max
                    scores = scores * log2_scale - anchor[:, None]
                else:
                    scores = log2_scores(scores, scale, softcap)
                    if part != 1:
                        visible = is_visible(
                            tokens[:, None], keys[None, :], diagonal, window_left, 0, num_keys
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
                if v is None:
                    v_tile = k_tile
                else:
                    v_tile = cached_tile(
                        v, v_strides, pages, rows, v_columns, inside, v_inside,
                        part != 1, DIM_V < BLOCK_V or SLOTS > 1,
                    )  # fmt: skip
                acc = acc * decay[:, None]
                acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")

    # A row that saw nothing has sum 0 and maximum -inf: out 0, lse -inf.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc * (1.0 / row_sum)[:, None]
    out += tl.cast(split, tl.int64) * split_stride * DIM_V
    out_pointers = row_pointers(out, out_strides, sample, heads, tokens, columns % BLOCK_V)
    mask = used[:, None] & v_inside[None, :]
    if SLOTS > 1:
        mask &= v_slots[None, :] == slots[:, None]
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=mask)
    lse += tl.cast(split, tl.int64) * split_stride
    offsets = (tl.cast(sample, tl.int64) * num_q_heads + heads) * num_queries + tokens
    tl.store(lse + offsets, (row_max + tl.log2(row_sum)) * LN2, mask=used)


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    q_to_k: Tensor | None,
    q_to_v: Tensor | None,
    window_left: int | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The ``attention_decode`` op.

    Shape:
        - query: ``(B, Hq, Nq, D)``
        - key_cache, value_cache: ``(B, Hk, S, D)`` and ``(B, Hv, S, Dv)``; with a block table,
          pages in the place of sequences
        - cache_lengths: ``(B,)``, block_table: ``(B, blocks)``, int32 or int64
        - q_to_k, q_to_v: int32 ``(Hq,)`` or ``(B, Hq)``; None for even contiguous groups

    Returns:
        out ``(B, Hq, Nq, Dv)``, stored tokens-major, and lse ``(B, Hq, Nq)``, fp32, natural log.
    """
    return _launch(
        Plan(
            query,
            None,
            key_cache,
            value_cache,
            cache_lengths,
            block_table,
            q_to_k,
            q_to_v,
            window_left,
            scale,
            softcap,
        )  # fmt: skip
    )


def latent_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The ``mla_decode`` op.

    Shape:
        - q_latent: ``(B, H, Nq, r)``, q_rope: ``(B, H, Nq, dr)``
        - cache: ``(B, S, r + dr)``; with a block table, ``(pages, page_size, r + dr)``

    Returns:
        out ``(B, H, Nq, r)``, stored tokens-major, and lse ``(B, H, Nq)``, fp32, natural log.
    """
    keys = cache.unsqueeze(1)
    return _launch(Plan(q_latent, q_rope, keys, None, cache_lengths, block_table, scale=scale))


def _launch(plan: Plan) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = plan.query.shape
    out = plan.query.new_empty(batch, tokens, heads, plan.value_dim).transpose(1, 2)
    lse = plan.query.new_empty(batch, heads, tokens, dtype=torch.float32)
    rows = batch * heads * tokens
    if rows == 0:
        return out, lse
    parts, part_lses = out, lse
    if plan.num_splits > 1:
        parts = lse.new_empty(plan.num_splits, batch, heads, tokens, plan.value_dim)
        part_lses = lse.new_empty(plan.num_splits, batch, heads, tokens)
    with torch.cuda.device_of(plan.query):
        _decode_kernel[(batch * plan.num_tiles * plan.num_splits,)](
            **plan.decode_arguments(parts, part_lses)
        )
        if plan.num_splits > 1:
            combine_kernel[(rows,)](**plan.combine_arguments(out, lse, parts, part_lses))
    return out, lse
