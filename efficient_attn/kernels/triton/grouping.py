"""Norms of key heads, and the groups of query heads that follow from them, in one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_attn.kernels.conventions import SMALLEST_SPREAD

_SMALLEST_SPREAD = tl.constexpr(SMALLEST_SPREAD)
_ELEMENTS = 4096  # of a tile of tokens


def key_norms(key: Tensor, key_lengths: Tensor | None) -> Tensor:
    """The ``key_norms`` op."""
    batch, heads, tokens, dim = key.shape
    norms = key.new_empty(batch, heads, dtype=torch.float32)
    if norms.numel():
        block_d = triton.next_power_of_2(dim)
        norms_kernel[(batch * heads,)](
            key, key_lengths, norms, key.stride(), heads, tokens, dim,
            BLOCK_D=block_d, TOKENS=max(1, _ELEMENTS // block_d),
            HAS_LENGTHS=key_lengths is not None, num_warps=4,
        )  # fmt: skip
    return norms


def allocate_heads(
    scores: Tensor, num_heads: int, min_queries: int, min_max: bool, nearest: bool
) -> tuple[Tensor, Tensor]:
    """The ``allocate_heads`` op."""
    rows, groups = scores.shape
    sizes = scores.new_empty(rows, groups, dtype=torch.int32)
    index = scores.new_empty(rows, num_heads, dtype=torch.int32)
    if rows:
        allocate_kernel[(rows,)](
            scores.contiguous(), sizes, index, groups, num_heads, min_queries,
            MIN_MAX=min_max, NEAREST=nearest, BLOCK_G=triton.next_power_of_2(groups),
            BLOCK_H=triton.next_power_of_2(num_heads), num_warps=4,
            # A remainder fused with the product before it would round differently from a CPU's.
            enable_fp_fusion=False,
        )  # fmt: skip
    return sizes, index


@triton.jit(do_not_specialize=["heads", "tokens"])
def norms_kernel(
    key, key_lengths, norms, strides, heads, tokens, dim,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """The norm of one key head of one sample.

    Tokens are added in fp64 and in their order, so that padding does not show in the result.
    """
    sample, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    length = tokens
    if HAS_LENGTHS:
        length = tl.load(key_lengths + sample).to(tl.int32)
    key += tl.cast(sample, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros((TOKENS,), tl.float64)
    for first in range(0, length, TOKENS):
        rows = first + tl.arange(0, TOKENS)
        pointers = key + rows.to(tl.int64)[:, None] * strides[2] + columns[None, :] * strides[3]
        mask = (rows < length)[:, None] & (columns < dim)[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(norms + tl.program_id(0), tl.sqrt(tl.sum(total, 0)).to(tl.float32))


@triton.jit
def allocate_kernel(
    scores, sizes, index, groups, num_heads, min_queries,
    MIN_MAX: tl.constexpr, NEAREST: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The groups that one row of scores gives, as sizes and as an index of heads."""
    row = tl.program_id(0)
    group = tl.arange(0, BLOCK_G)
    real = group < groups
    score = tl.load(scores + row * groups + group, mask=real, other=0.0)
    low = tl.min(tl.where(real, score, float("inf")), 0)
    high = tl.max(tl.where(real, score, float("-inf")), 0)
    share = score
    if MIN_MAX:
        share = tl.div_rn(score - low, high - low)
    share = tl.where(real, share, 0.0)
    total = tl.sum(share.to(tl.float64), 0).to(tl.float32)
    # The extremes skip a NaN; the total does not, nor does it hide an infinity.
    is_finite = tl.abs(total) < float("inf")
    tells = is_finite & (low >= 0.0) & (high - low > _SMALLEST_SPREAD * high)
    free = num_heads - min_queries * groups
    quota = tl.where(tells, tl.div_rn(share, total) * free, 0.0)
    floor = tl.floor(quota)
    size = floor.to(tl.int32)
    remainder = quota - floor
    if NEAREST:
        is_odd = (size & 1) == 1
        size += ((remainder > 0.5) | ((remainder == 0.5) & is_odd)).to(tl.int32)
        # Every quota is rounded by at most a half, so this many steps always suffice.
        for _ in range(groups // 2):
            excess = tl.sum(size, 0) - free
            largest = tl.argmax(tl.where(real, size, -1), 0)
            smallest = tl.argmin(tl.where(real, size, num_heads + 1), 0)
            chosen = tl.where(excess > 0, largest, smallest)
            step = (excess < 0).to(tl.int32) - (excess > 0).to(tl.int32)
            size += tl.where(group == chosen, step, 0)
    else:
        left = free - tl.sum(size, 0)
        remainder = tl.where(real, remainder, -1.0)
        is_before = (remainder[None, :] > remainder[:, None]) | (
            (remainder[None, :] == remainder[:, None]) & (group[None, :] < group[:, None])
        )
        rank = tl.sum(is_before.to(tl.int32), 1)
        size += (rank < left).to(tl.int32)
    even = num_heads // groups + (group < num_heads % groups).to(tl.int32)
    size = tl.where(real, tl.where(tells, size + min_queries, even), 0)
    tl.store(sizes + row * groups + group, size, mask=real)
    ends = tl.cumsum(size, 0)
    head = tl.arange(0, BLOCK_H)
    is_behind = (ends[None, :] <= head[:, None]) & real[None, :]
    found = tl.sum(is_behind.to(tl.int32), 1)
    tl.store(index + row * num_heads + head, found, mask=head < num_heads)
