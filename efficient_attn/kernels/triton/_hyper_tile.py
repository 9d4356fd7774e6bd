"""Device code that the HyperAttention kernels share: where rows and keys lie, and what they see.

Rows are numbered as in a plan, head by head through the queries that read one key head. What does
not count carries a log weight of -inf, which is the only mask there is.
"""

import triton
import triton.language as tl

from efficient_attn.kernels.triton._tile import LOG2E


@triton.jit
def gather(matrix, strides, heads, tokens, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``(heads, tokens)`` of a sample, zero where not inside and beyond DIM."""
    columns = tl.arange(0, BLOCK)
    pointers = row_pointers(matrix, strides, heads, tokens)[:, None]
    pointers += columns.to(tl.int64)[None, :] * strides[3]
    if DIM != BLOCK:
        return tl.load(pointers, mask=inside[:, None] & (columns < DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None], other=0.0)


@triton.jit
def scatter(matrix, strides, heads, tokens, inside, values, DIM: tl.constexpr):
    """Write rows ``(heads, tokens)`` of a sample, where inside and within DIM."""
    columns = tl.arange(0, values.shape[1])
    pointers = row_pointers(matrix, strides, heads, tokens)[:, None]
    pointers += columns.to(tl.int64)[None, :] * strides[3]
    mask = inside[:, None] & (columns < DIM)[None, :]
    tl.store(pointers, values.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def row_pointers(matrix, strides, heads, tokens):
    head_offsets = tl.cast(heads, tl.int64) * strides[1]
    return matrix + (head_offsets + tl.cast(tokens, tl.int64) * strides[2]) * strides[4]


@triton.jit
def of_sample(matrix, strides, sample):
    """Where the (heads, tokens, dim) tensor of a sample begins."""
    return matrix + tl.cast(sample, tl.int64) * strides[0] * strides[4]


@triton.jit
def near_keys(positions, num_keys, first_leaf, leaf_size, window, CAUSAL: tl.constexpr):
    """The exact keys ``[first, end)`` of queries at these positions, sinks apart.

    No position is before leaf ``first_leaf``, from which leaves are counted so that what is
    divided is not negative.
    """
    begin = first_leaf * leaf_size
    start = (positions - begin) // leaf_size * leaf_size + begin
    end = positions + 1 if CAUSAL else start + leaf_size + window
    return tl.maximum(start - window, 0), tl.minimum(tl.maximum(end, 0), num_keys)


@triton.jit
def half_slot(position, size, ODD: tl.constexpr):
    """Whether a position is in an odd (or even) segment, and how many such are before it."""
    within = position % (2 * size)
    before = position // (2 * size) * size
    if ODD:
        return within >= size, before + tl.maximum(within - size, 0)
    else:
        return within < size, before + tl.minimum(within, size)


@triton.jit
def query_slot(level, queries, num_queries, num_keys, leaf_size, width, HALVES: tl.constexpr):
    """Whether queries have a block at a level, and where their part of its results is.

    In the recursion those of every other segment have one; elsewhere all may.
    """
    if HALVES:
        corner = num_keys - num_queries
        has, slot = half_slot(tl.maximum(queries + corner, 0), leaf_size << level, True)
        _, first = half_slot(tl.maximum(corner, 0), leaf_size << level, True)
        return has & (queries + corner >= 0), level * width + slot - first
    else:
        return queries >= 0, level * width + queries


@triton.jit
def key_slot(level, ranks, leaf_size, width, HALVES: tl.constexpr):
    """The same for keys by their rank: segments keep their place when keys are sorted."""
    if HALVES:
        has, slot = half_slot(ranks, leaf_size << level, False)
        return has, level * width + slot
    else:
        return ranks >= 0, level * width + ranks


@triton.jit
def scores_of(products, log_weights, scale):
    """Scores in units of log 2; ``log_weights`` broadcasts, and None is 0 everywhere."""
    scores = products * (scale * LOG2E)
    if log_weights is not None:
        weighted = scores + log_weights * LOG2E
        scores = tl.where(log_weights == float("-inf"), float("-inf"), weighted)
    return scores


@triton.jit
def visit_keys(q_tile, k_tile, v_tile, log_weights, scale, g_tile, row_first, row_second, acc):
    """Let rows attend to a tile of keys.

    Forward, ``g_tile`` is None and a row carries the maximum and the sum of its weights; backward,
    its log-sum-exp and ``delta``, which stay as they are.

    Returns:
        Both statistics, and the sum of outputs, or of gradients of the rows before ``scale``.
    """
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    scores = scores_of(products, log_weights, scale)
    if g_tile is None:
        new_max = tl.maximum(row_first, tl.max(scores, 1))
        # A row that has seen nothing yet must not subtract -inf from -inf.
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - anchor[:, None])
        decay = tl.exp2(row_first - anchor)
        row_second = row_second * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        return new_max, row_second, acc
    else:
        weights = tl.exp2(scores - row_first[:, None])
        grad_weights = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
        grad_products = weights * (grad_weights - row_second[:, None])
        acc = tl.dot(grad_products.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
        return row_first, row_second, acc


@triton.jit
def visit_rows(
    k_tile, v_tile, q_tile, g_tile, log_weights, scale, row_lse, row_delta, k_acc, v_acc,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr,
):  # fmt: skip
    """Add what a tile of rows gives to the gradients of keys, before ``scale``, and of values.

    ``log_weights`` broadcasts to (keys, rows). A sum that is not wanted stays as it is.
    """
    products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
    weights = tl.exp2(scores_of(products, log_weights, scale) - row_lse[None, :])
    if WITH_V:
        v_acc = tl.dot(weights.to(g_tile.dtype), g_tile, v_acc, input_precision="ieee")
    if WITH_K:
        grad_weights = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
        grad_products = weights * (grad_weights - row_delta[None, :])
        k_acc = tl.dot(grad_products.to(q_tile.dtype), q_tile, k_acc, input_precision="ieee")
    return k_acc, v_acc


@triton.jit
def zero_or_ruled_out(counts):
    """The log weight of what counts once, or not at all."""
    return tl.where(counts, 0.0, float("-inf"))


@triton.jit
def in_band(ranks, first, end):
    return (ranks >= first) & (ranks < end)
