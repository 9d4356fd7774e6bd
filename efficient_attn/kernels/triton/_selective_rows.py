"""Device code that selects: the largest of many values, by their number or by what they weigh.

Numbers in fp32 are ordered as the unsigned integers that :func:`ordered` makes of them, so that the
last value to be selected is found bit by bit, without sorting.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """An unsigned integer for each number, larger for a larger one; both zeros are the same."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def measured(x, log2_lse, BY_MASS: tl.constexpr):
    """What each value counts: its softmax weight, or one."""
    if BY_MASS:
        return tl.exp2(x - log2_lse)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def values_of(values, places, first, count, BLOCK: tl.constexpr):
    """Some of the values of a row, those at ``places`` if it is given, and which there are."""
    index = first + tl.arange(0, BLOCK)
    inside = index < count
    if places is not None:
        index = tl.load(places + index, mask=inside, other=0)
    return tl.load(values + index, mask=inside, other=float("-inf")), inside


@triton.jit
def total_from(
    values, places, first, count, floor, log2_lse, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """What the values ``first`` to ``count`` whose order is ``floor`` at least count together."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, count, BLOCK):
        x, inside = values_of(values, places, start, count, BLOCK)
        counts = inside & (ordered(x) >= floor)
        total += tl.where(counts, measured(x, log2_lse, BY_MASS), 0.0)
    return tl.sum(total, 0)


@triton.jit
def last_selected(
    values, places, first, count, enough, log2_lse, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest floor from which on values count ``enough``; 0 if all of them do not."""
    floor = tl.zeros((), tl.uint32)
    for i in range(32):
        trial = floor | (tl.full((), 1, tl.uint32) << (31 - i))
        total = total_from(values, places, first, count, trial, log2_lse, BY_MASS, BLOCK)
        floor = tl.where(total >= enough, trial, floor)
    return floor
