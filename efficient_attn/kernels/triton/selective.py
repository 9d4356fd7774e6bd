"""Attention of a few tokens to a cache that reads the values of the largest scores alone.

Three kernels. The first reads the keys, once for all query heads that share them, and keeps every
score and the largest of each block of keys. The second finds the few keys of a query that may be
selected: with k to select, the k-th largest of the blocks' maxima is a floor. The third selects
among those exactly, the earliest of equal ones first, and reads their values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_attn.kernels.triton import _arguments, configs
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
from efficient_attn.kernels.triton._selective_rows import (
    last_selected,
    measured,
    ordered,
    total_from,
    values_of,
)
from efficient_attn.kernels.triton._tile import (
    LN2,
    LOG2E,
    head_read,
    is_visible,
    log2_scores,
    span,
)

_NOT_SPECIALIZED = (*NOT_SPECIALIZED, "num_blocks", "enough")


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _score_kernel(
    scores, maxima, part_lses, split_stride, num_blocks,
    q, q_strides, k, k_strides, cache_lengths, block_table, block_table_stride,
    q_to_k, q_to_k_stride, num_q_heads, num_k_heads, num_queries, capacity,
    window_left, scale, softcap, num_tiles, num_splits, smallest_split, run,
    DIM_QK: tl.constexpr, BLOCK_QK: tl.constexpr, HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one key head, in blocks of COLUMNS."""
    tile = tl.program_id(0) % num_tiles
    split = tl.program_id(0) // num_tiles % num_splits
    sample = tl.program_id(0) // num_tiles // num_splits
    num_keys = cached_length(cache_lengths, sample, capacity)
    diagonal = num_keys - num_queries
    begin, _, _, _, end = span(0, num_queries - 1, diagonal, window_left, 0, num_keys, COLUMNS)
    size = split_size(begin, end, num_splits, smallest_split, COLUMNS)
    first_key = begin + split * size
    last_key = tl.minimum(first_key + size, end)
    # A sequence with nothing to see still has a softmax, and its first part says so.
    if (split > 0) & (first_key >= end):
        return
    if HEADS is None:
        k_head, _, heads, tokens, _, used = even_rows(
            tile, run, num_q_heads, num_k_heads, num_k_heads, num_queries, ROWS
        )
    else:
        k_head, _, heads, tokens, _, used = mapped_rows(
            tile, q_to_k, q_to_k_stride, q_to_k, q_to_k_stride, sample,
            num_q_heads, num_k_heads, num_k_heads, num_queries, ROWS, HEADS,
        )  # fmt: skip
        if tl.sum(used.to(tl.int32), 0) == 0:
            return
    columns = tl.arange(0, BLOCK_QK)
    k_inside = columns < DIM_QK
    q_pointers = row_pointers(q, q_strides, sample, heads, tokens, columns)
    q_tile = tl.load(q_pointers, mask=used[:, None] & k_inside[None, :], other=0.0)
    k += tl.cast(k_head, tl.int64) * k_strides[1] * k_strides[4]
    k_columns = columns.to(tl.int64) * k_strides[3]
    if block_table is not None:
        block_table += tl.cast(sample, tl.int64) * block_table_stride

    rows = (tl.cast(sample, tl.int64) * num_q_heads + heads) * num_queries + tokens
    row_blocks = rows * num_blocks
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    for start in range(first_key, last_key, COLUMNS):
        start = tl.multiple_of(start, COLUMNS)
        keys = start + tl.arange(0, COLUMNS)
        inside = keys < num_keys
        pages, cached = pages_and_rows(sample, block_table, start, inside, True, COLUMNS, PAGE_SIZE)
        k_tile = cached_tile(
            k, k_strides, pages, cached, k_columns, inside, k_inside, True, DIM_QK < BLOCK_QK
        )
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        visible = is_visible(tokens[:, None], keys[None, :], diagonal, window_left, 0, num_keys)
        tile_scores = tl.where(visible, log2_scores(products, scale, softcap), float("-inf"))
        block_max = tl.max(tile_scores, 1)
        new_max = tl.maximum(row_max, block_max)
        # A row that has seen nothing yet must not subtract -inf from -inf.
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum *= tl.exp2(row_max - anchor)
        row_sum += tl.sum(tl.exp2(tile_scores - anchor[:, None]), 1)
        row_max = new_max
        pointers = scores + (row_blocks * COLUMNS)[:, None] + keys[None, :]
        tl.store(pointers, tile_scores, mask=used[:, None])
        tl.store(maxima + row_blocks + start // COLUMNS, block_max, mask=used)
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    part_lses += tl.cast(split, tl.int64) * split_stride
    tl.store(part_lses + rows, row_max + tl.log2(row_sum), mask=used)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _candidates_kernel(
    lse, candidates, num_candidates, scores, maxima, part_lses, split_stride, num_blocks,
    cache_lengths, num_q_heads, num_queries, capacity, window_left,
    num_splits, smallest_split, enough,
    BY_MASS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens that one query row may select, in ascending order, and its log-sum-exp."""
    row = tl.program_id(0)
    sample = row // num_queries // num_q_heads
    num_keys = cached_length(cache_lengths, sample, capacity)
    begin, _, _, _, end = span(
        0, num_queries - 1, num_keys - num_queries, window_left, 0, num_keys, COLUMNS
    )
    used = tl.cdiv(end - begin, split_size(begin, end, num_splits, smallest_split, COLUMNS))
    used = tl.maximum(used, 1)
    splits = tl.arange(0, SPLITS)
    lses = part_lses + splits.to(tl.int64) * split_stride + row
    lses = tl.load(lses, mask=splits < used, other=float("-inf"))
    largest = tl.max(lses, 0)
    anchor = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(lses - anchor), 0)
    log2_lse = largest + tl.log2(tl.where(total == 0.0, 1.0, total))
    tl.store(lse + row, log2_lse * LN2)

    first_block = tl.cast(row, tl.int64) * num_blocks
    scores += first_block * COLUMNS
    candidates += first_block * COLUMNS
    if BY_MASS:
        # All that weigh less than their share of what may be dropped can go together.
        floor = ordered(log2_lse + tl.log2((1.0 - enough) / tl.maximum(num_keys, 1)))
    else:
        last_block = tl.cdiv(end, COLUMNS)
        floor = last_selected(
            maxima + first_block, None, begin // COLUMNS, last_block, enough, 0.0, False, BLOCK
        )
    count = tl.zeros((), tl.int32)
    for start in range(begin, end, BLOCK):
        x, inside = values_of(scores, None, start, end, BLOCK)
        found = inside & (ordered(x) >= floor) & (x != float("-inf"))
        places = count + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(candidates + places, start + tl.arange(0, BLOCK), mask=found)
        count += tl.sum(found.to(tl.int32), 0)
    tl.store(num_candidates + row, count)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attend_kernel(
    out, out_strides, kept, lse, candidates, num_candidates, scores, num_blocks,
    v, v_strides, block_table, block_table_stride, q_to_v, q_to_v_stride,
    num_q_heads, num_v_heads, num_queries, enough,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BY_MASS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One query row: the selection among its candidates, and the values of what is selected."""
    row = tl.program_id(0)
    token = row % num_queries
    head = row // num_queries % num_q_heads
    sample = row // num_queries // num_q_heads
    count = tl.load(num_candidates + row)
    row_lse = tl.load(lse + row)
    log2_lse = row_lse * LOG2E
    scores += tl.cast(row, tl.int64) * num_blocks * COLUMNS
    candidates += tl.cast(row, tl.int64) * num_blocks * COLUMNS
    floor = last_selected(scores, candidates, 0, count, enough, log2_lse, BY_MASS, BLOCK)
    # Of those that equal the last one selected, so much is still wanted.
    above = total_from(scores, candidates, 0, count, floor + 1, log2_lse, BY_MASS, BLOCK)
    wanted = enough - above

    columns = tl.arange(0, BLOCK_V)
    v_head = head_read(q_to_v, q_to_v_stride, sample, head, num_q_heads, num_v_heads)
    v += tl.cast(v_head, tl.int64) * v_strides[1] * v_strides[4]
    v_columns = columns.to(tl.int64) * v_strides[3]
    acc = tl.zeros((BLOCK_V,), tl.float32)
    mass = tl.zeros((), tl.float32)
    equals = tl.zeros((), tl.int32)
    for first in range(0, count, TOGETHER):
        index = first + tl.arange(0, TOGETHER)
        inside = index < count
        tokens = tl.load(candidates + index, mask=inside, other=0)
        x = tl.load(scores + tokens, mask=inside, other=float("-inf"))
        level = inside & (ordered(x) == floor)
        before = equals + tl.cumsum(level.to(tl.int32), 0) - level.to(tl.int32)
        equals += tl.sum(level.to(tl.int32), 0)
        has_room = before.to(tl.float32) * measured(x, log2_lse, BY_MASS) < wanted
        selected = inside & ((ordered(x) > floor) | (level & has_room))
        weights = tl.where(selected, tl.exp2(x - log2_lse), 0.0)
        mass += tl.sum(weights, 0)
        if PAGE_SIZE is None:
            pages = tl.cast(sample, tl.int64)
            cached = tokens
        else:
            table = block_table + tl.cast(sample, tl.int64) * block_table_stride
            pages = tl.load(table + tokens // PAGE_SIZE, mask=selected, other=0).to(tl.int64)
            cached = tokens % PAGE_SIZE
        values = cached_tile(
            v, v_strides, pages, cached, v_columns, selected, columns < DIM_V,
            True, DIM_V < BLOCK_V,
        )  # fmt: skip
        acc += tl.sum(values.to(tl.float32) * weights[:, None], 0)
    # Where nothing is selected although there is something to see, a score is not a number, and
    # that must show: zero by zero.
    blind = row_lse == float("-inf")
    mass = tl.where(blind, 1.0, mass)
    tl.store(kept + row, mass)
    out += (
        tl.cast(sample, tl.int64) * out_strides[0]
        + tl.cast(head, tl.int64) * out_strides[1]
        + tl.cast(token, tl.int64) * out_strides[2]
    ) * out_strides[4]
    values = (acc / mass).to(out.dtype.element_ty)
    tl.store(out + columns * out_strides[3], values, mask=columns < DIM_V)


class _ScorePlan(Plan):
    """The plan of a call whose first kernel reads keys alone: they stand in for the values."""

    @property
    def loaded_columns(self) -> int:
        return sum(self.key_blocks)


_OF_VALUES = (
    "out", "out_strides", "lse", "q_tail", "q_tail_strides", "v", "v_strides", "q_to_v",
    "q_to_v_stride", "num_v_heads", "FOLD_SCALE", "BLOCK_TAIL", "SLOTS", "DIM_V", "BLOCK_V",
)  # fmt: skip
_OF_ROWS = (
    "split_stride", "cache_lengths", "num_q_heads", "num_queries", "capacity", "window_left",
    "num_splits", "smallest_split", "COLUMNS",
)  # fmt: skip


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
    top_values: int | None,
    dropped_mass: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``selective_decode`` op.

    Shape:
        - query: ``(B, Hq, Nq, D)``
        - key_cache, value_cache: ``(B, Hk, S, D)`` and ``(B, Hv, S, Dv)``; with a block table,
          pages in the place of sequences

    Returns:
        out ``(B, Hq, Nq, Dv)``, stored tokens-major, relative to the weight of what is selected;
        lse and that weight, ``(B, Hq, Nq)``, fp32.
    """
    batch, heads, tokens, _ = query.shape
    value_dim = value_cache.shape[-1]
    out = query.new_empty(batch, tokens, heads, value_dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    kept = torch.empty_like(lse)
    rows = batch * heads * tokens
    if rows == 0:
        return out, lse, kept
    plan = _ScorePlan(
        query, None, key_cache, key_cache, cache_lengths, block_table, q_to_k, q_to_k,
        window_left, scale, softcap,
    )  # fmt: skip
    arguments = plan.decode_arguments(out, lse)
    columns = plan.tile.columns
    num_blocks = max(1, triton.cdiv(plan.capacity, columns))
    kept_from_keys = {
        "scores": lse.new_empty(rows, num_blocks * columns),
        "num_blocks": num_blocks,
    }
    statistics = {
        "maxima": lse.new_empty(rows, num_blocks),
        "part_lses": lse.new_empty(plan.num_splits, rows),
    }
    found = {
        "candidates": lse.new_empty(rows, num_blocks * columns, dtype=torch.int32),
        "num_candidates": lse.new_empty(rows, dtype=torch.int32),
        "lse": lse,
        "enough": 1.0 - dropped_mass if top_values is None else float(top_values),
        "BY_MASS": top_values is None,
    }
    with torch.cuda.device_of(query):
        _score_kernel[(batch * plan.num_tiles * plan.num_splits,)](
            **_without(arguments, _OF_VALUES), **kept_from_keys, **statistics
        )
        _candidates_kernel[(rows,)](
            **{name: arguments[name] for name in _OF_ROWS},
            **kept_from_keys, **statistics, **found,
            SPLITS=triton.next_power_of_2(plan.num_splits), BLOCK=2048,
            **configs.Tile(0, 0, 8, 1).options(),
        )  # fmt: skip
        _attend_kernel[(rows,)](
            **_value_arguments(arguments, value_cache, q_to_v, out),
            **kept_from_keys, **found, kept=kept, BLOCK=1024,
            **configs.Tile(0, 0, 4, 1).options(),
        )  # fmt: skip
    return out, lse, kept


def _without(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def _value_arguments(
    arguments: dict[str, Any], value: Tensor, q_to_v: Tensor | None, out: Tensor
) -> dict[str, Any]:
    index = _arguments.contiguous(q_to_v)
    width = _arguments.padded(value.shape[-1])
    shared = ("block_table", "block_table_stride", "num_q_heads", "num_queries")
    return {name: arguments[name] for name in (*shared, "PAGE_SIZE", "COLUMNS")} | {
        "out": out,
        "out_strides": _arguments.in_granules(*out.stride()),
        "v": value,
        "v_strides": _arguments.in_granules(*value.stride()),
        "q_to_v": index,
        "q_to_v_stride": _arguments.row_stride(index),
        "num_v_heads": value.shape[1],
        "DIM_V": value.shape[-1],
        "BLOCK_V": width,
        "TOGETHER": max(16, min(64, 8192 // width)),
    }
