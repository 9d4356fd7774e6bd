"""The native `selective_decode` against the fp64 reference, and on any number of threads."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_attn import HeadMap, reference
from efficient_attn.testing import assert_accurate, head_maps
from tests.csrc.test_decode import INTEGERS, LAYOUTS, in_pages, index_maps, inputs

MAPS = head_maps(batch=3)
# Scores of few bits are equal in one precision and not in another, so those have to be told apart.
EVERYTHING = st.sampled_from([{"top_values": 500}, {"max_dropped_mass": 0.0}])
SELECTIONS = st.sampled_from(
    [{"top_values": k} for k in (1, 3, 20, 150)] + [{"max_dropped_mass": e} for e in (0.05, 0.7)]
)


@pytest.fixture
def decode(use_native):
    """The native op behind the arguments of the reference, as (out, lse, dropped mass)."""

    def call(
        query, key, value, *, cache_lengths, block_table=None, head_map=None, window=None,
        scale=None, softcap=0.0, top_values=None, max_dropped_mass=0.0,
    ):  # fmt: skip
        maps = (None, None) if head_map is None else (head_map.q_to_k, head_map.q_to_v)
        left = None if window is None else window[0]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse, kept = torch.ops.efficient_attn_native.selective_decode(
            query, key, value, cache_lengths, block_table, *maps, left, scale, softcap,
            top_values, max_dropped_mass,
        )  # fmt: skip
        return out, lse, 1 - kept

    return call


def assert_right(op, *tensors, **options):
    truth, plain = (
        reference.selective_decode(*x, **options, value_weights="renormalised")
        for x in ([x.double() for x in tensors], tensors)
    )
    for a, t, p in zip(op(*tensors, **options), truth, plain, strict=True):
        assert_accurate(a, t, p)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_call(decode, poisoned_memory, data):
    draw = data.draw
    head_map = draw(st.sampled_from(sorted(MAPS)).map(MAPS.get) | index_maps())
    lengths = draw(st.lists(st.integers(0, 200), min_size=3, max_size=3))
    dims = draw(st.tuples(*[st.sampled_from([1, 7, 16, 24, 33, 64, 80, 128, 200])] * 2))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    selection = draw(SELECTIONS if dtype == torch.float64 else EVERYTHING)
    query, *caches = inputs(head_map, lengths, draw(st.integers(1, 16)), 200, dims, dtype)
    table = None
    if page_size := draw(st.sampled_from([None, 1, 16, 64, 100])):
        *caches, table = in_pages(caches, lengths, page_size, draw(INTEGERS))
    query, *caches = (LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x) for x in (query, *caches))
    assert_right(
        decode, query, *caches, **selection,
        cache_lengths=torch.tensor(lengths, dtype=draw(INTEGERS)),
        block_table=table,
        head_map=head_map,
        window=draw(st.sampled_from([None, (0, 0), (5, 0), (90, 0)])),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        scale=draw(st.sampled_from([None, 0.7, -0.2])),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rising", [False, True], ids=["any order", "rising scores"])
def test_many_splits_select_what_one_would(decode, dtype, rising):
    # Keys of small whole numbers give exact scores in every precision, with many ties.
    lengths, head_map = [9000, 70], HeadMap.diff(4, k=1, v=2)
    key = torch.randint(-3, 4, (2, 1, 9000, 16))
    key = key.sort(dim=2).values if rising else key
    query = torch.randint(-2, 3, (2, 4, 2, 16)).abs()
    value = torch.randn(2, 2, 9000, 24)
    tensors = [x.to(dtype) for x in (query, key, value)]
    for selection in ({"top_values": 1}, {"top_values": 100}, {"top_values": 2000}):
        assert_right(
            decode, *tensors, cache_lengths=torch.tensor(lengths), head_map=head_map,
            scale=0.5, **selection,
        )  # fmt: skip


@pytest.mark.parametrize("selection", [{"top_values": 50}, {"max_dropped_mass": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(decode, dtype, selection):
    head_map = HeadMap.from_index([0, 1, 1, 0, 1], [0, 0, 1, 1, 0])
    query, *caches = inputs(head_map, [9000, 17, 0], 2, 9000, (64, 96), dtype)
    options = {"cache_lengths": torch.tensor([9000, 17, 0]), "head_map": head_map, **selection}
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2, 2):
            torch.set_num_threads(threads)
            results.append(decode(query, *caches, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_more_queries_than_fit_at_once(decode):
    head_map = HeadMap.from_index([0, 1, 1, 0, 1, 2], [0, 0, 1, 1, 0, 1], num_k_heads=3)
    query, *caches = inputs(head_map, [400, 100], 301, 400, (24, 40), torch.float64)
    options = {"cache_lengths": torch.tensor([400, 100]), "head_map": head_map}
    assert_right(decode, query, *caches, **options, window=(60, 0), top_values=9)


def test_what_is_refused(decode):
    query, *caches = inputs(HeadMap.gqa(4, 2), [3, 4])
    lengths = torch.tensor([3, 4])
    with pytest.raises(RuntimeError, match=r"cache_lengths\[1\] is 33"):
        decode(query, *caches, cache_lengths=torch.tensor([3, 33]), top_values=2)
    for selection in ({"top_values": 0}, {"max_dropped_mass": 1.0}):
        with pytest.raises(RuntimeError, match="pass a positive number"):
            decode(query, *caches, cache_lengths=lengths, **selection)
