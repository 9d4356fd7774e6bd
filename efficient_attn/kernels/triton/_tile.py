"""Device code that the attention kernels share: who works on what, what it may see, its scores.

An optional feature is an argument that may be None, and what is None is compiled away. Rows are
queries and columns are keys throughout. Indices are 32-bit; whatever is multiplied by a stride is
64-bit. Strides are (batch, heads, tokens, dim, granule), the first three in granules: a granule of
8 elements tells the compiler that it may load 8 at once.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# At least as long as any tile of the backward kernels.
ROW_PADDING = tl.constexpr(128)


@triton.jit
def assignment(num_blocks, num_heads, heads_together):
    """Sample, head and block of this program.

    Heads run in sections of ``heads_together``, whose keys and values fit the L2 cache together;
    within a section all heads work on one block before any goes on to the next.
    """
    program = tl.program_id(0)
    sample = program // (num_blocks * num_heads)
    index = program % (num_blocks * num_heads)
    first_head = index // (num_blocks * heads_together) * heads_together
    index -= first_head * num_blocks
    width = tl.minimum(heads_together, num_heads - first_head)
    head = first_head + index % width
    block = index // width
    # So that widening to 64 bits needs no sign.
    tl.assume(sample >= 0)
    tl.assume(head >= 0)
    tl.assume(block >= 0)
    return sample, head, block


@triton.jit
def extent(sample, cu_seqlens_q, cu_seqlens_k, num_queries, num_keys):
    """First query, number of queries, first key and number of keys of a sample.

    Packed sequences begin at ``cu_seqlens``; dense ones at 0, their samples a batch stride apart.
    """
    first_query = tl.zeros((), tl.int64)
    first_key = tl.zeros((), tl.int64)
    if cu_seqlens_q is not None:
        first_query = tl.load(cu_seqlens_q + sample).to(tl.int64)
        first_key = tl.load(cu_seqlens_k + sample).to(tl.int64)
        num_queries = (tl.load(cu_seqlens_q + sample + 1) - first_query).to(tl.int32)
        num_keys = (tl.load(cu_seqlens_k + sample + 1) - first_key).to(tl.int32)
    tl.assume(first_query >= 0)
    tl.assume(first_key >= 0)
    return first_query, num_queries, first_key, num_keys


@triton.jit
def used_keys(sample, key_lengths, num_keys):
    """How many of the keys of a sample count."""
    if key_lengths is not None:
        length = tl.load(key_lengths + sample).to(tl.int32)
        num_keys = tl.minimum(tl.maximum(length, 0), num_keys)
    return num_keys


@triton.jit
def head_read(index, index_stride, sample, head, num_q_heads, num_heads):
    """The key (or value) head that a query head reads; a shared map has stride 0."""
    if index is None:
        read = head // (num_q_heads // num_heads)
    else:
        read = tl.load(index + tl.cast(sample, tl.int64) * index_stride + head)
    tl.assume(read >= 0)
    return read


@triton.jit
def span(first, last, diagonal, left, right, length, BLOCK: tl.constexpr):
    """The positions that lines ``first`` to ``last`` see, cut into tiles of BLOCK.

    Line ``i`` sees positions ``i + diagonal - left`` to ``i + diagonal + right`` of ``length``.

    Returns:
        begin, left_end, full_begin, full_end, end: some lines see some of ``[begin, left_end)`` and
        of ``[full_end, end)``; every line sees all of ``[full_begin, full_end)``. All but the ends
        are multiples of BLOCK.
    """
    begin = tl.zeros((), tl.int32)
    full_begin = tl.zeros((), tl.int32)
    end = length
    full_end = length
    if left is not None:
        begin = tl.maximum(first + diagonal - left, 0) // BLOCK * BLOCK
        full_begin = tl.cdiv(tl.maximum(last + diagonal - left, 0), BLOCK) * BLOCK
    if right is not None:
        end = tl.maximum(tl.minimum(last + diagonal + right + 1, length), 0)
        full_end = tl.maximum(tl.minimum(first + diagonal + right + 1, length), 0)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, tl.minimum(full_begin, end), full_begin, full_end, end


@triton.jit
def is_visible(rows, columns, diagonal, left, right, num_keys):
    """Which scores of a tile count; rows and columns broadcast against each other."""
    visible = columns < num_keys
    if left is not None:
        visible &= columns >= rows + diagonal - left
    if right is not None:
        visible &= columns <= rows + diagonal + right
    return visible


@triton.jit
def plane(pointer, strides, sample, head, first_row):
    """Where the (tokens, dim) matrix of one head begins.

    Packed tensors have no batch stride; ``first_row`` says where their sample begins.
    """
    pointer += tl.cast(head, tl.int64) * strides[1] * strides[4]
    if strides[0] is None:
        return pointer + tl.cast(first_row, tl.int64) * strides[2] * strides[4]
    else:
        return pointer + tl.cast(sample, tl.int64) * strides[0] * strides[4]


@triton.jit
def tile_pointers(matrix, strides, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of a tile of a (tokens, dim) matrix, from ``first_row`` on."""
    first = tl.cast(first_row, tl.int64)
    tl.assume(first >= 0)
    row_stride = tl.cast(strides[2], tl.int64) * strides[4]
    rows = tl.arange(0, ROWS)[:, None] * row_stride
    columns = tl.arange(0, COLUMNS).to(tl.int64)[None, :] * strides[3]
    return matrix + first * row_stride + (rows + columns)


@triton.jit
def load_tile(pointers, first_row, num_rows, DIM: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """The tile at these addresses, zero beyond ``num_rows`` and DIM."""
    ROWS: tl.constexpr = pointers.shape[0]
    COLUMNS: tl.constexpr = pointers.shape[1]
    inside_rows = (first_row + tl.arange(0, ROWS) < num_rows)[:, None]
    inside_columns = (tl.arange(0, COLUMNS) < DIM)[None, :]
    if CHECK_ROWS and DIM != COLUMNS:
        return tl.load(pointers, mask=inside_rows & inside_columns, other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=inside_rows, other=0.0)
    elif DIM != COLUMNS:
        return tl.load(pointers, mask=inside_columns, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(pointers, values, first_row, num_rows, DIM: tl.constexpr):
    """Write what lies within ``num_rows`` and DIM."""
    ROWS: tl.constexpr = pointers.shape[0]
    COLUMNS: tl.constexpr = pointers.shape[1]
    inside = (first_row + tl.arange(0, ROWS) < num_rows)[:, None]
    if DIM != COLUMNS:
        inside &= (tl.arange(0, COLUMNS) < DIM)[None, :]
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def row_offsets(sample, head, rows, first_query, num_queries, num_q_heads, cu_seqlens_q):
    """Where rows lie in a statistic of (batch, heads, tokens), or (tokens, heads) if packed."""
    if cu_seqlens_q is None:
        return (tl.cast(sample, tl.int64) * num_q_heads + head) * num_queries + rows
    else:
        return (first_query + rows) * num_q_heads + head


@triton.jit
def log2_scores(products, scale, softcap):
    """Scores in units of log 2 (so that exp2 undoes them), before the bias."""
    if softcap is None:
        return products * (scale * LOG2E)
    else:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), right at both infinities.
        growth = tl.exp2(products * (scale / softcap * (2 * LOG2E)))
        return (1.0 - 2.0 / (1.0 + growth)) * (softcap * LOG2E)


@triton.jit
def load_bias(bias, strides, rows, columns, num_queries, num_keys, CHECK_COLUMNS: tl.constexpr):
    """Bias tile in units of log 2; ``bias`` points at the (queries, keys) plane of one head."""
    # A row beyond the last is never stored, so it may see any bias that exists.
    rows = tl.minimum(rows, num_queries - 1).to(tl.int64)
    pointers = bias + (rows * strides[2] * strides[4] + columns.to(tl.int64) * strides[3])
    if CHECK_COLUMNS:
        values = tl.load(pointers, mask=columns < num_keys, other=0.0)
    else:
        values = tl.load(pointers)
    return values.to(tl.float32) * LOG2E


@triton.jit
def row_statistics(
    delta, log2_lse, sample, head, first_query, num_q_heads, padded_queries, cu_seqlens_q
):
    """Where the rows of one head begin in both statistics of the backward pass.

    Those are (batch, heads, tokens) or (heads, packed tokens), and every sample begins at a
    multiple of ROW_PADDING and has room to the next, so that whole tiles can be read unchecked.
    """
    if cu_seqlens_q is None:
        offset = (tl.cast(sample, tl.int64) * num_q_heads + head) * padded_queries
    else:
        start = (first_query + tl.cast(sample, tl.int64) * ROW_PADDING) // ROW_PADDING * ROW_PADDING
        offset = tl.cast(head, tl.int64) * padded_queries + start
    return delta + offset, log2_lse + offset


@triton.jit
def recomputed_weights(
    products,
    row_lse,
    rows,
    columns,
    bias,
    bias_strides,
    num_queries,
    num_keys,
    diagonal,
    window_left,
    window_right,
    scale,
    softcap,
    MASKED: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
):
    """The softmax weights of the forward pass, and the slope of the softcap.

    Rows and columns broadcast to the shape of ``products``, which may be transposed.
    """
    scores = log2_scores(products, scale, softcap)
    slope = 1.0
    if softcap is not None:
        capped = scores * (LN2 / softcap)
        slope = 1.0 - capped * capped
    if bias is not None:
        scores += load_bias(bias, bias_strides, rows, columns, num_queries, num_keys, CHECK_COLUMNS)
    if MASKED:
        visible = is_visible(rows, columns, diagonal, window_left, window_right, num_keys)
        scores = tl.where(visible, scores, float("-inf"))
    return tl.exp2(scores - row_lse), slope
