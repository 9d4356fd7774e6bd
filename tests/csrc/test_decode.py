"""The native `attention_decode` and `mla_decode` against the fp64 reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_attn import HeadMap, reference
from efficient_attn.testing import assert_accurate, head_maps

INTEGERS = st.sampled_from([torch.int32, torch.int64])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MAPS = head_maps(batch=3)


@pytest.fixture
def decode(use_native):
    """The native op behind the arguments of the reference."""

    def call(
        query, key, value, *, cache_lengths, block_table=None, head_map=None, window=None,
        scale=None, softcap=0.0,
    ):  # fmt: skip
        maps = (None, None) if head_map is None else (head_map.q_to_k, head_map.q_to_v)
        left = None if window is None else window[0]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.efficient_attn_native.attention_decode(
            query, key, value, cache_lengths, block_table, *maps, left, scale, softcap
        )

    return call


def assert_right(op, query, key, value, **options):
    truth = reference.attention_decode(query.double(), key.double(), value.double(), **options)
    plain = reference.attention_decode(query, key, value, **options)
    actual = op(query, key, value, **options)
    for a, t, p in zip(actual, truth, plain, strict=True):
        assert_accurate(a, t, p)
    return actual


def inputs(head_map, lengths, tokens=1, room=32, dims=(16, 16), dtype=torch.float32):
    """A query, and a dense cache with NaN behind each length."""
    query = torch.randn(len(lengths), head_map.num_q_heads, tokens, dims[0]).to(dtype)
    caches = [
        torch.randn(len(lengths), heads, room, dim).to(dtype)
        for heads, dim in zip((head_map.num_k_heads, head_map.num_v_heads), dims, strict=True)
    ]
    for b, length in enumerate(lengths):
        for cache in caches:
            cache[b, :, length:] = torch.nan
    return query, *caches


def in_pages(caches, lengths, page_size, dtype=torch.int32):
    """Dense caches in shuffled pages, NaN wherever there is no token, and their block table."""
    batch, blocks = len(lengths), -(-caches[0].shape[2] // page_size)
    order = torch.randperm(batch * blocks + 2)
    table = torch.full((batch, blocks), -7, dtype=dtype)
    pages = [x.new_full((len(order), x.shape[1], page_size, x.shape[3]), torch.nan) for x in caches]
    for b, length in enumerate(lengths):
        for block, start in enumerate(range(0, length, page_size)):
            table[b, block] = page = int(order[b * blocks + block])
            for paged, dense in zip(pages, caches, strict=True):
                rows = dense[b, :, start : min(length, start + page_size)]
                paged[page, :, : rows.shape[1]] = rows
    return *pages, table


LAYOUTS = {
    "heads-major": lambda x: x,
    "tokens-major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 3), value=torch.nan)[..., :-3],
    "last dimension strided": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every other token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
}


@st.composite
def index_maps(draw):
    heads, k, v = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rows = draw(st.sampled_from([None, 3]))

    def index(count):
        flat = draw(st.lists(st.integers(0, count - 1), min_size=heads * (rows or 1),
                             max_size=heads * (rows or 1)))  # fmt: skip
        index = torch.tensor(flat, dtype=torch.int32)
        return index if rows is None else index.view(rows, heads)

    return HeadMap.from_index(index(k), index(v), num_k_heads=k, num_v_heads=v)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_call(decode, poisoned_memory, data):
    draw = data.draw
    head_map = draw(st.sampled_from(sorted(MAPS)).map(MAPS.get) | index_maps())
    lengths = draw(st.lists(st.integers(0, 200), min_size=3, max_size=3))
    dims = draw(st.tuples(*[st.sampled_from([1, 7, 16, 24, 33, 64, 80, 128, 200])] * 2))
    tokens = draw(st.integers(1, 16))
    query, *caches = inputs(head_map, lengths, tokens, 200, dims, draw(st.sampled_from(DTYPES)))
    table = None
    if page_size := draw(st.sampled_from([None, 1, 16, 64, 100])):
        *caches, table = in_pages(caches, lengths, page_size, draw(INTEGERS))
    query, *caches = (LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x) for x in (query, *caches))
    out, _ = assert_right(
        decode, query, *caches,
        cache_lengths=torch.tensor(lengths, dtype=draw(INTEGERS)),
        block_table=table,
        head_map=head_map,
        window=draw(st.sampled_from([None, (0, 0), (5, 0), (90, 0)])),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        scale=draw(st.sampled_from([None, 0.7, -0.2])),
    )  # fmt: skip
    assert out.transpose(1, 2).is_contiguous()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_latent_call(use_native, poisoned_memory, data):
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 150), min_size=2, max_size=2))
    rank, rope = draw(st.sampled_from([1, 16, 33, 64, 130])), draw(st.sampled_from([0, 4, 16, 64]))
    heads, tokens, dtype = (
        draw(st.integers(1, 18)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(DTYPES)),
    )
    queries = [torch.randn(2, tokens, heads, d).to(dtype).transpose(1, 2) for d in (rank, rope)]
    cache = torch.randn(2, 1, 150, rank + rope).to(dtype)
    for b, length in enumerate(lengths):
        cache[b, :, length:] = torch.nan
    table = None
    if page_size := draw(st.sampled_from([None, 16, 64])):
        cache, table = in_pages([cache], lengths, page_size)
    cache = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](cache).squeeze(1)
    options = {
        "cache_lengths": torch.tensor(lengths),
        "block_table": table,
        "scale": (rank + rope) ** -0.5,
    }
    actual = torch.ops.efficient_attn_native.mla_decode(*queries, cache, *options.values())
    truth = reference.mla_decode(*(x.double() for x in (*queries, cache)), **options)
    plain = reference.mla_decode(*queries, cache, **options)
    for a, t, p in zip(actual, truth, plain, strict=True):
        assert_accurate(a, t, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences_in_many_splits(decode, dtype):
    # One head alone is cut too, and what is left over at its end is not a whole block.
    for head_map in (HeadMap.mqa(3), HeadMap.diff(4, k=1, v=2), HeadMap.mha(2)):
        query, *caches = inputs(head_map, [5003, 70], 2, 5003, (128, 64), dtype)
        assert_right(
            decode, query, *caches, cache_lengths=torch.tensor([5003, 70]), head_map=head_map
        )


def test_more_queries_than_fit_at_once(decode):
    head_map = HeadMap.from_index([0, 1, 1, 0, 1, 2], [0, 0, 1, 1, 0, 1], num_k_heads=3)
    query, *caches = inputs(head_map, [400, 100], 301, 400, (24, 40))
    options = {"cache_lengths": torch.tensor([400, 100]), "head_map": head_map}
    for window in (None, (20, 0)):
        assert_right(decode, query, *caches, **options, window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(decode, dtype):
    head_map = HeadMap.from_index([0, 1, 1, 0, 1], [0, 0, 1, 1, 0])
    query, *caches = inputs(head_map, [9000, 17, 0], 2, 9000, (64, 96), dtype)
    options = {"cache_lengths": torch.tensor([9000, 17, 0]), "head_map": head_map}
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(decode(query, *caches, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])


def test_heads_that_nobody_reads_are_not_read(decode):
    head_map = HeadMap.from_index([2, 2, 0], [1, 3, 1], num_k_heads=4, num_v_heads=5)
    query, key, value = inputs(head_map, [32, 20])
    key[:, [1, 3]] = value[:, [0, 2, 4]] = torch.nan
    options = {"cache_lengths": torch.tensor([32, 20]), "head_map": head_map}
    clean = [x.nan_to_num(0) for x in (key, value)]
    expected = reference.attention_decode(query, *clean, **options)
    torch.testing.assert_close(decode(query, key, value, **options), expected)


def test_a_cached_nan_is_not_hidden(decode):
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = inputs(HeadMap.mha(2), [20, 20], dtype=dtype)
        key[0, 1, 4, 3] = torch.nan
        out, lse = decode(query, key, value, cache_lengths=torch.tensor([20, 20]))
        assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
        assert not out[1].isnan().any() and not out[0, 0].isnan().any()


def test_scores_of_any_size(decode):
    query, key, value = inputs(HeadMap.mha(2), [150, 150], room=150)
    lengths = torch.tensor([150, 150])
    for scale in (1e-4, 30.0, 1e4):
        assert_right(decode, query, key, value, cache_lengths=lengths, scale=scale)
    # Values that grow along the sequence, so that every block moves the maximum.
    key = key.abs() * torch.arange(150)[:, None] / 10
    assert_right(decode, query.abs(), key, value, cache_lengths=lengths)


def test_what_is_refused(decode):
    query, *caches = inputs(HeadMap.gqa(4, 2), [3, 4])
    lengths = torch.tensor([3, 4])
    table = torch.tensor([[0, 1], [1, 5]])
    for change, message in (
        ({"cache_lengths": torch.tensor([3, 33])}, r"cache_lengths\[1\] is 33"),
        ({"cache_lengths": torch.tensor([-1, 3])}, r"cache_lengths\[0\] is -1"),
        ({"cache_lengths": lengths.float()}, "Float; pass int32 or int64"),
        ({"cache_lengths": lengths[:1]}, "each of 2 sequences"),
        ({"block_table": table, "cache_lengths": lengths + 32}, r"block_table\[1, 1\] is 5"),
        ({"head_map": HeadMap.from_index([0, 1, 2, 1])}, "q_to_. holds 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            decode(query, *caches, **{"cache_lengths": lengths, **change})
    with pytest.raises(RuntimeError, match="different dtypes"):
        decode(query.bfloat16(), *caches, cache_lengths=lengths)
    with pytest.raises(RuntimeError, match="Int; pass float16"):
        decode(query.int(), *(x.int() for x in caches), cache_lengths=lengths)
    with pytest.raises(RuntimeError, match="3 query heads do not divide"):
        decode(query[:, :3], *caches, cache_lengths=lengths)
