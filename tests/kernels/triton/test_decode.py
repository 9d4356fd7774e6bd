"""Attention to a cache: the kernels against the reference, what they read, how they split."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_attn.head_map import HeadMap
from efficient_attn.kernels.triton import _decode_plan, configs
from efficient_attn.kernels.triton._decode_plan import Plan, best_splits
from efficient_attn.testing import head_maps
from tests.cached_inputs import LENGTHS, in_pages
from tests.kernels.triton.cached import assert_close, assert_same, cached, compare, randn, run
from tests.kernels.triton.oracle import DEVICE

MAPS = head_maps(batch=len(LENGTHS))
GROUPS = HeadMap.from_group_sizes([0, 3, 1])


@pytest.mark.parametrize("name", MAPS)
def test_head_maps(name, poisoned_memory):
    inputs = cached(MAPS[name])
    out, _ = compare(*inputs, LENGTHS, MAPS[name])
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["mqa", "more value heads", "uneven", "one row per sample"])
def test_several_tokens(name, poisoned_memory):
    compare(*cached(MAPS[name], tokens=4), LENGTHS, MAPS[name])


@pytest.mark.parametrize(
    "head_map",
    [
        HeadMap.diff(10, k=2, v=10),  # five value heads for each key head, eight side by side
        HeadMap.diff(12, k=1, v=6),
        HeadMap.mqa(40),  # more rows than a tile
        HeadMap.from_group_sizes([20, 0, 17, 3]),  # more heads than are compared at once
        HeadMap.from_index([0, 1] * 9, [0, 0, 1] * 6),
    ],
    ids=["five values", "six values", "many heads", "many uneven heads", "two maps"],
)
def test_groups_of_any_size(head_map, poisoned_memory):
    compare(*cached(head_map, lengths=(37,), room=37), (37,), head_map)


def test_value_heads_side_by_side_are_cut_into_pieces(monkeypatch, poisoned_memory):
    monkeypatch.setattr(_decode_plan, "_LARGEST_VALUE_BLOCK", 64)
    head_map = HeadMap.diff(10, k=2, v=10)
    compare(*cached(head_map, lengths=(37,), room=37), (37,), head_map)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (1, {"window": (40, 0)}),
        (3, {"window": (0, 0)}),
        (3, {"window": (33, 0), "softcap": 2.0}),
        (16, {"softcap": 1.5, "scale": 0.7}),
        (2, {"scale": -0.3}),
        (2, {"scale": 0.0}),
        (71, {}),  # more queries than keys
    ],
    ids=str,
)
def test_options(tokens, options, poisoned_memory):
    compare(*cached(GROUPS, (5, 70), tokens), (5, 70), GROUPS, **options)


@pytest.mark.parametrize("dims", [(8, 8), (40, 64), (72, 20), (192, 128), (256, 200)], ids=str)
def test_head_dims(dims):
    compare(*cached(HeadMap.gqa(4, 2), (70,), 2, dims), (70,), HeadMap.gqa(4, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    out, lse = compare(*cached(GROUPS, dtype=dtype, dims=(64, 32)), LENGTHS, GROUPS, floor=2e-3)
    assert out.dtype == dtype and lse.dtype == torch.float32


# Larger than a tile of the interpreter, equal to it, smaller, and not dividing it.
@pytest.mark.parametrize(
    ("name", "page_size"),
    [("gqa", 64), ("gqa", 32), ("gqa", 24), ("one row per sample", 16), ("more value heads", 16)],
)
def test_pages(name, page_size, poisoned_memory):
    head_map = MAPS[name].to(DEVICE)
    query, *caches = cached(head_map)
    dense = run(query, *caches, LENGTHS, head_map=head_map)
    table, *pools = in_pages(LENGTHS, page_size, *caches)
    assert_close(run(query, *pools, LENGTHS, table, head_map), dense)


def test_a_window_reads_its_own_rows_and_pages_only(poisoned_memory):
    query, key, value = cached(HeadMap.gqa(4, 2), (70,), 2)
    dense = run(query, key, value, (70,), window=(20, 0))
    key[:, :, :48] = value[:, :, :48] = torch.nan  # The first of the two tokens sees 48 to 68.
    table, *pools = in_pages((70,), 16, key, value)
    table[0, :3] = -(2**30)
    assert_close(run(query, *pools, (70,), table, window=(20, 0)), dense)


@pytest.mark.parametrize("layout", ["heads", "strided", "broadcast"])
def test_any_strides(layout):
    query, key, value = cached(GROUPS, (70, 70))
    change = {
        "heads": torch.Tensor.contiguous,
        "strided": lambda x: torch.stack([x, x], -1)[..., 1],
        "broadcast": lambda x: x[:1].expand_as(x),
    }[layout]
    compare(*map(change, (query, key, value)), (70, 70), GROUPS)


@pytest.mark.skipif(DEVICE == "cuda", reason="only the CPU hands out memory that is never touched")
def test_offsets_beyond_32_bits():
    # Ten pages or rows, one every 2**28 elements: the last begins 2**31 elements behind the first.
    rows, stride = 10, 2**28
    storage = torch.empty(rows * stride, dtype=torch.float16)
    query, key, _ = cached(HeadMap.mha(1), (rows,), dims=(16, 16), room=rows, dtype=torch.float16)
    expected = run(query, key, key, (rows,))
    apart = storage.as_strided((1, 1, rows, 16), (0, 0, stride, 1))
    apart.copy_(key)
    assert_same(run(query, apart, apart, (rows,)), expected)
    pool = storage.as_strided((rows, 1, 1, 16), (stride, 0, 16, 1))
    table = torch.arange(rows, dtype=torch.int64)[None]
    assert_same(run(query, pool, pool, (rows,), table), expected)


def test_heads_that_nobody_reads_are_not_read():
    query, key, value = cached(GROUPS)
    key[:, 0] = value[:, 0] = torch.nan
    compare(query, key, value, LENGTHS, GROUPS)


def test_lengths_beyond_the_cache_read_what_there_is():
    query, key, value = cached(GROUPS, (70, 70), room=70)
    expected = run(query, key, value, (70, 0), head_map=GROUPS.to(DEVICE))
    assert_same(run(query, key, value, (900, -3), head_map=GROUPS.to(DEVICE)), expected)


@pytest.mark.parametrize(("batch", "tokens", "room"), [(0, 1, 4), (2, 0, 4), (2, 1, 0)])
def test_sizes_of_zero(batch, tokens, room, poisoned_memory):
    inputs = cached(GROUPS, [0] * batch, tokens, room=room)
    out, lse = run(*inputs, [0] * batch, head_map=GROUPS.to(DEVICE))
    assert out.shape == (batch, 4, tokens, 24) and not out.any()
    assert (lse == -torch.inf).all()


def test_results_are_repeatable_and_hardly_depend_on_the_splits(monkeypatch):
    inputs = cached(GROUPS, (200, 9), 2, room=200)
    maps = {"head_map": GROUPS.to(DEVICE)}
    first = run(*inputs, (200, 9), **maps)
    assert_same(run(*inputs, (200, 9), **maps), first)
    for programs in (1, 64):
        monkeypatch.setattr(configs, "resident_programs", lambda *_, n=programs: n)
        assert_close(run(*inputs, (200, 9), **maps), first)


@pytest.mark.gpu
def test_a_graph_follows_the_lengths_and_the_map():
    head_map = GROUPS.to("cuda")
    inputs = cached(GROUPS, (4000, 4000), room=4000, dtype=torch.bfloat16, dims=(64, 64))
    lengths = torch.tensor([17, 4000], device="cuda", dtype=torch.int32)

    def call():
        return torch.ops.efficient_attn.attention_decode(
            *inputs, lengths, None, head_map.q_to_k, head_map.q_to_v, None, 0.125, 0.0
        )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = call()
    for new_lengths, new_map in (([4000, 1], [2, 1, 1, 0]), ([0, 2500], [0, 0, 0, 0])):
        lengths.copy_(torch.tensor(new_lengths))
        head_map.q_to_k.copy_(torch.tensor(new_map))
        graph.replay()
        assert_same(outs, call())


def plan(head_map, batch=1, tokens=1, dims=(128, 128), room=8192):
    def meta(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    return Plan(
        meta(batch, head_map.num_q_heads, tokens, dims[0]),
        None,
        meta(batch, head_map.num_k_heads, room, dims[0]),
        meta(batch, head_map.num_v_heads, room, dims[1]),
        torch.empty(batch, dtype=torch.int32, device="meta"),
        None,
        head_map.q_to_k,
        head_map.q_to_v,
    )


@pytest.mark.parametrize(
    ("head_map", "slots", "tiles"),
    [
        (HeadMap.gqa(32, 8), 1, 8),
        (HeadMap.mha(32), 1, 32),
        (HeadMap.diff(32, k=4, v=16), 4, 4),
        (HeadMap.diff(24, k=4, v=12), 4, 4),
        (HeadMap.diff(32, k=16, v=4), 1, 16),
        (HeadMap.diff(64, k=2, v=32), 4, 8),
        (HeadMap.mqa(128), 1, 2),
    ],
    ids=str,
)
def test_a_key_head_is_one_tile(head_map, slots, tiles, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: "sm90")
    of = plan(head_map)
    assert (of.slots, of.num_tiles) == (slots, tiles)


@settings(max_examples=200, deadline=None)
@given(
    index=st.lists(st.integers(0, 7), min_size=1, max_size=40),
    tokens=st.integers(1, 16),
    arch=st.sampled_from(["sm90", "interpreted"]),
)
def test_there_are_programs_for_every_tile_of_a_map(index, tokens, arch):
    of = plan(HeadMap.from_index(index, num_k_heads=8), tokens=tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "architecture", lambda device: arch)
        rows = of.tile.rows
        needed = sum(-(-index.count(head) * tokens // rows) for head in set(index))
        assert needed <= of.num_tiles <= needed + len(index) * tokens // rows + 8


def test_the_fewest_splits_that_keep_the_device_busy():
    assert best_splits(tiles=8, programs=264, most=1) == 1
    assert 29 <= best_splits(tiles=8, programs=264, most=128) <= 33
    assert best_splits(tiles=256, programs=264, most=128) == 1
    assert best_splits(tiles=300, programs=264, most=128) > 1
    for tiles, most in itertools.product((1, 7, 264, 1000), (1, 5, 128)):
        assert 1 <= best_splits(tiles, 264, most) <= most


def test_a_short_cache_or_window_is_not_split(monkeypatch):
    monkeypatch.setattr(configs, "resident_programs", lambda *_: 264)
    assert plan(HeadMap.gqa(4, 2), room=32).num_splits == 1
    of = plan(HeadMap.gqa(4, 2), room=10**6)
    assert of.num_splits > 100
    object.__setattr__(of, "window_left", 0)
    del of.__dict__["num_splits"]
    assert of.num_splits <= 2


def test_numbers_of_queries_are_no_reason_to_compile_again():
    # A launch differs in what is not specialised only.
    one, two = (
        plan(HeadMap.gqa(8, 2), batch, tokens=tokens).decode_arguments(randn(1, 8, 1, 8), None)
        for batch, tokens in ((1, 1), (3, 2))
    )
    differing = {
        name
        for name in one
        if not isinstance(one[name], (torch.Tensor, tuple)) and one[name] != two[name]
    }
    assert differing <= set(_decode_plan.NOT_SPECIALIZED)
