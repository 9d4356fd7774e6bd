"""`attention_decode` and `mla_decode` against the reference: lengths, pages, maps, options."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import efficient_attn as ea
from efficient_attn import HeadMap, UnsupportedError, reference
from efficient_attn.testing import assert_accurate, head_maps

LENGTHS = torch.tensor([0, 1, 9, 32, 17])
MAPS = head_maps(batch=len(LENGTHS))


def paged(cache, lengths, page_size=8, spare=3, index_dtype=torch.int32):
    """The same cache in shuffled pages, with NaN wherever no token of a sequence is."""
    batch, heads, tokens, dim = cache.shape
    blocks = -(-tokens // page_size)
    pages = torch.full((batch * blocks + spare, heads, page_size, dim), torch.nan).to(cache.dtype)
    order = torch.randperm(len(pages))
    table = torch.full((batch, blocks), -7, dtype=index_dtype)
    for b, length in enumerate(lengths.tolist()):
        for block in range(-(-length // page_size)):
            page = int(order[b * blocks + block])
            rows = cache[b, :, block * page_size : min(length, (block + 1) * page_size)]
            pages[page, :, : rows.shape[1]] = rows
            table[b, block] = page
    return pages, table


def call(head_map, lengths=LENGTHS, tokens=1, room=32, dims=(8, 6), dtype=torch.float64):
    """A query, and a cache of which only what the lengths name may be read."""
    batch = len(lengths)
    query = torch.randn(batch, tokens, head_map.num_q_heads, dims[0], dtype=dtype).transpose(1, 2)
    caches = [
        torch.randn(batch, heads, room, dim, dtype=dtype)
        for heads, dim in zip((head_map.num_k_heads, head_map.num_v_heads), dims, strict=True)
    ]
    for b, length in enumerate(lengths.tolist()):
        for cache in caches:
            cache[b, :, length:] = torch.nan
    return query, *caches


@pytest.mark.parametrize("options", [{}, {"window": (3, 0)}, {"softcap": 1.5, "scale": 0.7}])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("name", MAPS)
def test_every_head_map(name, tokens, options, poisoned_memory):
    query, key, value = call(MAPS[name], tokens=tokens)
    options = {"head_map": MAPS[name], **options}
    expected = reference.attention_decode(query, key, value, cache_lengths=LENGTHS, **options)
    actual = ea.attention_decode(
        query, key, value, cache_lengths=LENGTHS, **options, return_lse=True
    )
    torch.testing.assert_close(actual, expected)
    assert actual[0].transpose(1, 2).is_contiguous()

    key_pages, table = paged(key, LENGTHS)
    value_pages = torch.full((*key_pages.shape[:1], value.shape[1], 8, 6), torch.nan).double()
    for b, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            value_pages[table[b, t // 8], :, t % 8] = value[b, :, t]
    in_pages = {"cache_lengths": LENGTHS, "block_table": table, **options}
    torch.testing.assert_close(
        reference.attention_decode(query, key_pages, value_pages, **in_pages), expected
    )
    torch.testing.assert_close(
        ea.attention_decode(query, key_pages, value_pages, **in_pages, return_lse=True), expected
    )


@pytest.mark.parametrize("tokens", [1, 4])
def test_is_the_last_rows_of_prefill(tokens):
    head_map = HeadMap.from_group_sizes([3, 0, 1])
    query, key, value = call(head_map, torch.tensor([21, 21]), tokens=21, room=21)
    whole = ea.attention(query, key, value, head_map=head_map, causal=True, return_lse=True)
    last = ea.attention_decode(
        query[:, :, -tokens:], key, value, cache_lengths=torch.tensor([21, 21]),
        head_map=head_map, return_lse=True,
    )  # fmt: skip
    for x, y in zip(last, whole, strict=True):
        torch.testing.assert_close(x, y[:, :, -tokens:])


@pytest.mark.parametrize("size", [15, 16, 17, 24, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_beside_the_height_of_a_tile(size, dtype):
    """No tile reaches over the end of its group."""
    head_map = HeadMap.from_group_sizes([size, 1, 0, size])
    query, key, value = call(head_map, torch.tensor([21, 5]), room=21, dtype=dtype)
    options = {"cache_lengths": torch.tensor([21, 5]), "head_map": head_map}
    expected = reference.attention_decode(query, key, value, **options)
    actual = ea.attention_decode(query, key, value, **options, return_lse=True)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (40, 24), (7, 33)])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_precision(dtype, dims, data):
    maps = head_maps(batch=3)
    head_map = maps[data.draw(st.sampled_from(sorted(maps)))]
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 300), min_size=3, max_size=3)))
    tokens = data.draw(st.integers(1, 6))
    query, key, value = call(head_map, lengths, tokens, 300, dims, dtype)
    options = {
        "cache_lengths": lengths,
        "head_map": head_map,
        "window": data.draw(st.sampled_from([None, (0, 0), (50, 0)])),
        "softcap": data.draw(st.sampled_from([0.0, 2.0])),
    }
    truth = reference.attention_decode(query.double(), key.double(), value.double(), **options)
    plain = reference.attention_decode(query, key, value, **options)
    actual = ea.attention_decode(query, key, value, **options, return_lse=True)
    for a, t, p in zip(actual, truth, plain, strict=True):
        assert_accurate(a, t, p)


@pytest.mark.parametrize("in_pages", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize(("rank", "rope"), [(16, 4), (10, 0), (33, 8)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_latent(tokens, rank, rope, in_pages, poisoned_memory):
    heads, scale = 5, 0.3
    queries = [torch.randn(5, tokens, heads, d).double().transpose(1, 2) for d in (rank, rope)]
    cache = torch.randn(5, 32, rank + rope).double()
    for b, length in enumerate(LENGTHS.tolist()):
        cache[b, length:] = torch.nan
    table = None
    if in_pages:
        pages, table = paged(cache.unsqueeze(1), LENGTHS, index_dtype=torch.int64)
        cache = pages.squeeze(1)
    options = {"cache_lengths": LENGTHS.int(), "block_table": table, "scale": scale}
    expected = reference.mla_decode(*queries, cache, **options)
    actual = ea.mla_decode(*queries, cache, **options, return_lse=True)
    torch.testing.assert_close(actual, expected)
    assert expected[0].shape == (5, heads, tokens, rank)


def test_has_no_gradient():
    query, key, value = call(HeadMap.mha(2), torch.tensor([3]))
    out = ea.attention_decode(query.requires_grad_(), key, value, cache_lengths=torch.tensor([3]))
    with pytest.raises(UnsupportedError, match="gradient of attention to a cache"):
        out.sum().backward()


def test_no_sequences_and_no_room():
    query, key, value = call(HeadMap.gqa(4, 2), torch.zeros(0, dtype=torch.int64))
    assert ea.attention_decode(
        query, key, value, cache_lengths=torch.zeros(0, dtype=torch.int64)
    ).shape == (0, 4, 1, 6)
    query, key, value = call(HeadMap.gqa(4, 2), torch.tensor([0]), room=0)
    out, lse = ea.attention_decode(
        query, key, value, cache_lengths=torch.tensor([0]), return_lse=True
    )
    assert (out == 0).all() and (lse == -torch.inf).all()


GOOD = {"cache_lengths": torch.tensor([3, 4])}
TABLE = torch.tensor([[0, 1], [1, 5]])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"cache_lengths": torch.tensor([3, 9])}, ValueError, r"lie in \[0, 8\]"),
        ({"cache_lengths": torch.tensor([-1, 4])}, ValueError, r"from -1 to 4"),
        ({"cache_lengths": torch.tensor([3])}, ValueError, "one length per sequence"),
        ({"cache_lengths": torch.tensor([3.0, 4.0])}, TypeError, "int32 or int64"),
        ({"block_table": TABLE[:1]}, ValueError, "one row per sequence"),
        ({"block_table": TABLE.double()}, TypeError, "int32 or int64"),
        (
            {"block_table": TABLE, "cache_lengths": torch.tensor([3, 9])},
            ValueError,
            r"block_table\[1, 1\] is 5.*in \[0, 2\)",
        ),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"window": 5}, TypeError, "pass \\(left, right\\)"),
        ({"head_map": HeadMap.mha(3)}, ValueError, "head_map is for 3 query"),
    ],
)
def test_what_is_refused(change, kind, message):
    query, key, value = (torch.randn(2, 4, n, 8) for n in (1, 8, 8))
    with pytest.raises(kind, match=message):
        ea.attention_decode(query, key, value, **{**GOOD, **change})


def test_caches_are_never_cast():
    query, key, value = (torch.randn(2, 4, n, 8) for n in (1, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="never cast"):
        ea.attention_decode(query.bfloat16(), key, value, **GOOD)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 1, 8), (2, 3, 1, 4), (2, 9, 11)), "must be 12"),
        (((2, 3, 1, 8), (2, 3, 2, 4), (2, 9, 12)), "agree in all but the last"),
        (((2, 3, 1, 8), (2, 3, 1, 4), (3, 9, 12)), "batch size 3"),
        (((2, 3, 8), (2, 3, 1, 4), (2, 9, 12)), "q_latent has shape"),
        (((2, 3, 1, 0), (2, 3, 1, 12), (2, 9, 12)), "kv_lora_rank 0"),
    ],
)
def test_latent_shapes_that_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        ea.mla_decode(*map(torch.randn, shapes), **GOOD, scale=1.0)
