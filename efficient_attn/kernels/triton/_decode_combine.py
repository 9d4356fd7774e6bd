"""The merging of what the splits of attention to a cache have found."""

import triton
import triton.language as tl

from efficient_attn.kernels.triton._decode_plan import NOT_SPECIALIZED
from efficient_attn.kernels.triton._decode_tile import cached_length, split_size
from efficient_attn.kernels.triton._tile import LN2, LOG2E, span


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def combine_kernel(
    out, out_strides, lse, parts, part_lses, split_stride, cache_lengths,
    num_q_heads, num_queries, capacity, window_left, num_splits, smallest_split,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query row, in the order of its keys. Parts without keys are not read.

    ``parts`` is (splits, rows, DIM_V) and ``part_lses`` (splits, rows), ``split_stride`` rows.
    """
    row = tl.program_id(0)
    token = row % num_queries
    head = row // num_queries % num_q_heads
    sample = row // num_queries // num_q_heads
    num_keys = cached_length(cache_lengths, sample, capacity)
    begin, _, _, _, end = span(
        0, num_queries - 1, num_keys - num_queries, window_left, 0, num_keys, COLUMNS
    )
    used = tl.cdiv(end - begin, split_size(begin, end, num_splits, smallest_split, COLUMNS))
    used = tl.maximum(used, 1)
    splits = tl.arange(0, SPLITS)
    part_lses += row
    lses = part_lses + splits.to(tl.int64) * split_stride
    lses = tl.load(lses, mask=splits < used, other=float("-inf"))
    largest = tl.max(lses, 0)
    anchor = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2((lses - anchor) * LOG2E), 0)
    total = tl.where(total == 0.0, 1.0, total)
    columns = tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, used, TOGETHER):
        some = first + tl.arange(0, TOGETHER)
        offsets = some.to(tl.int64) * split_stride
        some_lses = tl.load(part_lses + offsets, mask=some < used, other=float("-inf"))
        weights = tl.exp2((some_lses - anchor) * LOG2E)
        pointers = parts + ((offsets + row) * DIM_V)[:, None] + columns[None, :]
        mask = (some < used)[:, None] & (columns < DIM_V)[None, :]
        acc += tl.sum(tl.load(pointers, mask=mask, other=0.0) * weights[:, None], 0)
    out += (
        tl.cast(sample, tl.int64) * out_strides[0]
        + tl.cast(head, tl.int64) * out_strides[1]
        + tl.cast(token, tl.int64) * out_strides[2]
    ) * out_strides[4]
    values = (acc / total).to(out.dtype.element_ty)
    tl.store(out + columns * out_strides[3], values, mask=columns < DIM_V)
    tl.store(lse + row, largest + tl.log2(total) * LN2)
