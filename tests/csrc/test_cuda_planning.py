"""The CUDA kernels that hash and sort: on the emulated machine, and, marked `gpu`, on a device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_attn.ops import _register, cuda
from efficient_attn.planning.hashing import directions
from efficient_attn.planning.ordering import segment_order
from tests.csrc.test_planning import any_example, assert_same_codes

emulated = torch.ops.efficient_attn_emulated


@settings(any_example, max_examples=25)
@given(
    tokens=st.integers(1, 70),
    repeats=st.integers(1, 3),
    first=st.integers(-40, 40),
    sizes=st.lists(st.integers(8, 90), min_size=1, max_size=3),
    bins=st.sampled_from([1, 2, 6, 70]),
    seed=st.integers(0, 2**16),
)
def test_order_by_the_kernels(use_native, tokens, repeats, first, sizes, bins, seed):
    """On the emulated machine, whose threads run in an order of the seed."""
    torch.manual_seed(seed)
    given_codes = torch.randint(bins, (1, 2, repeats * tokens), dtype=torch.int32)
    arguments = (given_codes, bins, sizes, tokens, first)
    actual = emulated.segment_order(*arguments, 4, 48 << 10, seed)
    for a, e in zip(actual, segment_order(*arguments), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("bins", [3, 300])
@pytest.mark.parametrize("repeats", [1, 2])
def test_order_by_the_kernels_in_several_tiles(use_native, poisoned_memory, bins, repeats):
    tokens = 3500 // repeats
    given_codes = torch.randint(bins, (1, 1, repeats * tokens), dtype=torch.int32)
    # With 300 bins there is memory for two warps.
    arguments = (given_codes, bins, [tokens, 1100], tokens, -50)
    actual = emulated.segment_order(*arguments, 132, 4 * 1000, 0)
    for a, e in zip(actual, segment_order(*arguments), strict=True):
        assert torch.equal(a, e)


def test_the_kernel_writes_nowhere_else_for_codes_out_of_range(use_native):
    given_codes = torch.tensor([[[5, -7, 2**30, 0]]], dtype=torch.int32)
    order, rank = emulated.segment_order(given_codes, 3, [4], 4, 0, 4, 48 << 10, 0)
    assert order.tolist() == [[[[3, 0, 1, 2]]]] and rank.tolist() == [[[[1, 2, 3, 0]]]]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"bins": 7000}, "7000 bins; a device with 49152 bytes of shared memory takes 1 to 6144"),
        ({"sizes": [4] * 25}, "25 levels; 24 are supported"),
        ({"sizes": [0]}, "a segment of size 0"),
        ({"first": -(2**30)}, r"4 rows from -1073741824 on; less than 2\*\*30 are supported"),
    ],
)
def test_the_kernel_refuses(use_native, changed, reason):
    arguments = {"bins": 3, "sizes": [4], "tokens": 4, "first": 0} | changed
    codes = torch.zeros(1, 1, 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=reason):
        emulated.segment_order(codes, *arguments.values(), 4, 48 << 10, 0)


@settings(any_example, max_examples=30)
@given(
    tokens=st.sampled_from([1, 31, 130, 300]),
    dim=st.sampled_from([8, 40]),
    bits=st.sampled_from([1, 7, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    mean=st.sampled_from([None, "all", "past", "past and own"]),
    leaf=st.sampled_from([40, 129, 500]),
    first=st.integers(-50, 350),
    seed=st.integers(0, 2**16),
)
def test_codes_by_the_kernels(use_native, tokens, dim, bits, dtype, mean, leaf, first, seed):
    """On the emulated machine, whose threads run in an order of the seed."""
    torch.manual_seed(seed)
    x = torch.randn(1, tokens, 2, dim).to(dtype).transpose(1, 2)
    normals = directions(seed, dim, 16, x.device)
    leaf, own = 0 if mean in (None, "all") else leaf, mean == "past and own"
    options = (normals, bits, mean is not None, leaf, first, own)
    assert_same_codes(emulated.lsh_codes(x, *options, seed), x, options)


CANDIDATES = {candidate.name: candidate for candidate in cuda.CANDIDATES}


@pytest.mark.parametrize(
    ("name", "machine"), [("lsh_codes", (0,)), ("segment_order", (132, 99 << 10, 0))]
)
def test_what_a_device_is_checked_with(use_native, name, machine):
    """The kernel covers it and agrees exactly, so that only a wrong kernel is refused."""
    candidate = CANDIDATES[name]
    arguments = candidate.sample(torch.device("cpu"))
    assert candidate.covers(*arguments)
    actual = getattr(emulated, name)(*arguments, *machine)
    expected = _register.implementation(name, "CUDA")(*arguments)
    many = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    assert all(map(candidate.agrees, *many))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 1, 9, 8, dtype=torch.float64),
        torch.zeros(1, 1, 9, 4, dtype=torch.bfloat16),
        torch.zeros(1, 1, 9, 16, dtype=torch.bfloat16)[..., 1:9],
        torch.zeros(1, 1, 8, 9).transpose(2, 3),
        torch.zeros(1, 1, 9, 1024),
    ],
    ids=["float64", "short rows", "rows that begin anywhere", "columns", "long rows"],
)
def test_tokens_that_the_kernels_do_not_cover(x):
    covers = CANDIDATES["lsh_codes"].covers
    assert not covers(x, torch.zeros(x.shape[-1], 16), 4, False, 0, 0, False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("bins", "sizes", "tokens", "repeats", "first"),
    [
        (129, [131072], 131072, 1, 0),
        (128, [4096 << level for level in range(5)], 131072, 1, 0),
        (2**13 + 1, [5000], 20000, 4, 0),
        (65, [1000, 3, 77], 9001, 2, -300),
        (1, [70000], 70000, 1, 5),
    ],
    ids=["full", "recursion", "bins", "segments", "equal"],
)
def test_order_on_a_device(bins, sizes, tokens, repeats, first):
    codes = torch.randint(bins, (2, 3, repeats * tokens), dtype=torch.int32)
    options = (bins, sizes, tokens, first)
    actual = torch.ops.efficient_attn.segment_order(codes.cuda(), *options)
    assert cuda.status("segment_order") is None
    for a, e in zip(actual, segment_order(codes, *options), strict=True):
        assert torch.equal(a.cpu(), e)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [None, "all", "past", "past and own"])
def test_codes_on_a_device(dtype, mean):
    x = torch.randn(2, 3, 5000, 128).to(dtype)
    leaf, own = 0 if mean in (None, "all") else 256, mean == "past and own"
    options = (directions(7, 128, 16, x.device), 11, mean is not None, leaf, -70, own)
    on_device = (x.cuda(), options[0].cuda(), *options[1:])
    actual = torch.ops.efficient_attn.lsh_codes(*on_device)
    assert cuda.status("lsh_codes") is None
    assert_same_codes(actual.cpu(), x, options)
    # The emulated machine adds up in the same order.
    few = (x[:1, :1, :700], *options)
    on_device = torch.ops.efficient_attn.lsh_codes(few[0].cuda(), few[1].cuda(), *few[2:])
    assert torch.equal(on_device.cpu(), emulated.lsh_codes(*few, 0))


@pytest.mark.gpu
def test_all_levels_are_sorted_by_one_launch():
    codes = torch.randint(64, (1, 8, 32768), dtype=torch.int32, device="cuda")
    arguments = (codes, 64, [1024 << level for level in range(5)], 32768, 0)
    torch.ops.efficient_attn.segment_order(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.ops.efficient_attn.segment_order(*arguments)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(names) == 1 and "SortBlock" in names[0]


@pytest.mark.gpu
def test_a_graph_captures_the_order():
    codes = torch.randint(64, (1, 2, 5000), dtype=torch.int32, device="cuda")
    arguments = (codes, 64, [5000], 5000, 0)
    torch.ops.efficient_attn.segment_order(*arguments)  # The check.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.efficient_attn.segment_order(*arguments)
    codes.copy_(codes.flip(-1))
    graph.replay()
    for a, e in zip(captured, segment_order(*arguments), strict=True):
        assert torch.equal(a, e)
