"""Device code of attention to a cache: which rows a program has, and where its keys and values lie.

A tile holds the query rows, (head, token) pairs, of heads that read one key head, and never of
others: its keys are read once for all of them. What is said in ``_tile.py`` holds here too.
"""

import triton
import triton.language as tl


@triton.jit
def even_rows(
    tile, run, num_q_heads, num_k_heads, num_v_heads, num_queries, ROWS: tl.constexpr
):  # fmt: skip
    """The rows of a tile under even contiguous groups, which are cut into runs of ``run`` heads.

    Returns:
        k_head, v_head: the key head of the tile and its first value head.
        heads, tokens, slots: what each row is, and how many value heads behind the first it reads.
        used: which rows there are.
    """
    group = num_q_heads // num_k_heads
    tiles_of_run = tl.cdiv(run * num_queries, ROWS)
    runs_of_group = tl.cdiv(group, run)
    index = tile // tiles_of_run
    k_head = index // runs_of_group
    first_in_group = index % runs_of_group * run
    rows = tile % tiles_of_run * ROWS + tl.arange(0, ROWS)
    used = rows < tl.minimum(run, group - first_in_group) * num_queries
    first = k_head * group + first_in_group
    heads = first + rows // num_queries
    readers = num_q_heads // num_v_heads
    v_head = first // readers
    return k_head, v_head, heads, rows % num_queries, heads // readers - v_head, used


@triton.jit
def mapped_rows(
    tile, q_to_k, q_to_k_stride, q_to_v, q_to_v_stride, sample,
    num_q_heads, num_k_heads, num_v_heads, num_queries, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """What :func:`even_rows` returns, for any map: a tile's heads read one key and one value head.

    Every program finds its tile anew, from an index that fits its registers: tiles are numbered by
    the head whose rows they begin with. There are as many as the map makes; beyond, none is used.
    """
    CHUNK: tl.constexpr = 32 if HEADS > 32 else HEADS
    heads = tl.arange(0, HEADS)
    k_heads = _reads(q_to_k, q_to_k_stride, sample, heads, num_q_heads, num_k_heads)
    v_heads = _reads(q_to_v, q_to_v_stride, sample, heads, num_q_heads, num_v_heads)
    pairs = tl.where(heads < num_q_heads, k_heads * num_v_heads + v_heads, -1)
    # How many earlier heads read the same pair.
    rank = tl.zeros((HEADS,), tl.int32)
    for first in range(0, HEADS, CHUNK):
        others = first + tl.arange(0, CHUNK)
        other_keys = _reads(q_to_k, q_to_k_stride, sample, others, num_q_heads, num_k_heads)
        other_values = _reads(q_to_v, q_to_v_stride, sample, others, num_q_heads, num_v_heads)
        same = pairs[:, None] == (other_keys * num_v_heads + other_values)[None, :]
        rank += tl.sum((same & (others[None, :] < heads[:, None])).to(tl.int32), 1)
    first_part = tl.cdiv(rank * num_queries, ROWS)
    tiles = tl.cdiv((rank + 1) * num_queries, ROWS) - first_part
    tiles = tl.where(heads < num_q_heads, tiles, 0)
    before = tl.cumsum(tiles, 0) - tiles
    begins = (tile >= before) & (tile < before + tiles)

    pair = tl.max(tl.where(begins, pairs, -2), 0)
    k_head = tl.sum(tl.where(begins, k_heads, 0), 0)
    v_head = tl.sum(tl.where(begins, v_heads, 0), 0)
    part = tl.sum(tl.where(begins, first_part + tile - before, 0), 0)
    rows = part * ROWS + tl.arange(0, ROWS)
    used = rows < tl.sum((pairs == pair).to(tl.int32), 0) * num_queries
    member = (pairs == pair)[None, :] & (rank[None, :] == (rows // num_queries)[:, None])
    row_heads = tl.sum(tl.where(member, heads[None, :], 0), 1)
    return k_head, v_head, row_heads, rows % num_queries, tl.zeros_like(rows), used


@triton.jit
def _reads(index, index_stride, sample, heads, num_q_heads, num_heads):
    """The key (or value) head that each query head reads; beyond the last head, what that reads."""
    heads = tl.minimum(heads, num_q_heads - 1)
    if index is None:
        return heads // (num_q_heads // num_heads)
    else:
        return tl.load(index + tl.cast(sample, tl.int64) * index_stride + heads)


@triton.jit
def cached_length(cache_lengths, sample, capacity):
    """How many tokens a sequence has, never more than there is room for."""
    return tl.minimum(tl.maximum(tl.load(cache_lengths + sample), 0), capacity).to(tl.int32)


@triton.jit
def split_size(begin, end, num_splits, smallest_split, COLUMNS: tl.constexpr):
    """How many of the keys from ``begin`` to ``end`` each split has, a multiple of COLUMNS.

    The last splits of a short sequence have none.
    """
    size = tl.cdiv(tl.cdiv(end - begin, num_splits), COLUMNS) * COLUMNS
    return tl.maximum(size, smallest_split)


@triton.jit
def pages_and_rows(
    sample, block_table, start, inside, CHECK: tl.constexpr, COLUMNS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """The page of each token of a tile, and its row there. A dense cache has a page per sequence.

    ``block_table`` points at the row of the sequence, of which only blocks that hold a token that
    is inside are looked up. A tile within one page looks it up once.
    """
    tokens = tl.arange(0, COLUMNS)
    if PAGE_SIZE is None:
        return tl.cast(sample, tl.int64), start + tokens
    elif PAGE_SIZE % COLUMNS == 0:
        page = tl.load(block_table + start // PAGE_SIZE).to(tl.int64)
        return page, start % PAGE_SIZE + tokens
    else:
        tokens = start + tokens
        if CHECK:
            pages = tl.load(block_table + tokens // PAGE_SIZE, mask=inside, other=0)
        else:
            pages = tl.load(block_table + tokens // PAGE_SIZE)
        return pages.to(tl.int64), tokens % PAGE_SIZE


@triton.jit
def cached_tile(
    head, strides, pages, rows, columns, inside_rows, inside_columns,
    CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The cached rows of a tile, zero where they are not inside; ``columns`` are offsets."""
    page_stride = tl.cast(strides[0], tl.int64) * strides[4]
    row_stride = tl.cast(strides[2], tl.int64) * strides[4]
    offsets = pages * page_stride + rows.to(tl.int64) * row_stride
    pointers = head + (offsets[:, None] + columns[None, :])
    if CHECK_ROWS and CHECK_COLUMNS:
        mask = inside_rows[:, None] & inside_columns[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=inside_rows[:, None], other=0.0)
    elif CHECK_COLUMNS:
        return tl.load(pointers, mask=inside_columns[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def row_pointers(tensor, strides, sample, heads, tokens, columns):
    """Addresses of the rows of a tile in a tensor of (batch, heads, tokens, dim)."""
    rows = heads.to(tl.int64) * strides[1] + tokens.to(tl.int64) * strides[2]
    rows = (rows + tl.cast(sample, tl.int64) * strides[0]) * strides[4]
    return tensor + (rows[:, None] + columns.to(tl.int64)[None, :] * strides[3])
