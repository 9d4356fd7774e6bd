"""Allocation by key norms: the published vectors, the loops they come from, and what must hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

import efficient_attn as ea
from efficient_attn import HeadMap
from efficient_attn.reference import grouping as reference

KHAN_KDGQA = {"normalization": "minmax", "rounding": "nearest"}
KHAN_DGQA = {"normalization": "sum", "rounding": "nearest"}
WAYS = [
    {"normalization": normalization, "rounding": rounding}
    for normalization in ("sum", "minmax")
    for rounding in ("remainder", "nearest")
]


def sizes_of(scores, num_heads, **options):
    return ea.allocate_heads(torch.tensor(scores, dtype=torch.float32), num_heads, **options)[0]


@pytest.mark.parametrize(
    ("norms", "num_heads", "expected"),
    [
        ((1, 2, 3), 6, (0, 2, 4)),
        ((0, 1, 1), 5, (1, 2, 2)),
        ((3, 3.3, 3.6, 4.5), 12, (0, 1, 3, 8)),
        ((10, 11, 12, 13, 14, 15), 12, (0, 1, 2, 2, 3, 4)),
        ((5, 1), 8, (8, 0)),
        ((1, 4, 4, 4), 16, (1, 5, 5, 5)),
        ((1, 2, 3, 4, 5, 6, 7, 8), 16, (0, 1, 1, 2, 2, 3, 3, 4)),
        ((0, 0, 0, 1), 32, (0, 0, 0, 32)),
        ((2, 1, 3), 12, (4, 0, 8)),
        ((1, 1, 2, 2), 12, (0, 0, 6, 6)),
        ((4, 7, 4, 9, 8, 7, 6, 5), 32, (0, 5, 0, 9, 7, 5, 4, 2)),
        ((1, 2, 2, 2, 2, 2), 12, (2, 2, 2, 2, 2, 2)),
        ((1, 1, 3, 3, 3), 8, (0, 0, 2, 3, 3)),
        ((9, 1, 5), 6, (4, 0, 2)),
    ],
)
def test_published_kdgqa(norms, num_heads, expected):
    assert tuple(sizes_of(norms, num_heads, **KHAN_KDGQA).tolist()) == expected


@pytest.mark.parametrize(
    ("memory", "norms", "num_heads", "difference", "ema"),
    [
        ((0, 0, 0), (1, 2, 3), 6, (1, 2, 3), (1, 2, 3)),
        ((0,) * 6, (1, 2, 3, 4, 5, 5), 20, (1, 2, 3, 4, 5, 5), (1, 2, 3, 4, 5, 5)),
        ((8, 17, 31), (10, 20, 30), 12, (4, 6, 2), (2, 4, 6)),
        ((0,) * 6, (100, 102, 98, 101, 99, 100), 12, (2,) * 6, (2,) * 6),
    ],
)
def test_published_dgqa(memory, norms, num_heads, difference, ema):
    norms, memory = (torch.tensor(x, dtype=torch.float32) for x in (norms, memory))
    for flavor, expected in (("difference", difference), ("ema", ema)):
        scores, after = ea.khan2024_scores(norms, memory, flavor=flavor, window=10)
        sizes, _ = ea.allocate_heads(scores, num_heads, **KHAN_DGQA)
        assert tuple(sizes.tolist()) == expected
        torch.testing.assert_close(after, (memory + norms) / 10)


def published_loops(norms, num_heads):
    """The rule as loops over one row, in fp32: numpy, apart from everything of ours."""
    norms = (norms - norms.min()) / (norms.max() - norms.min())
    sizes = np.rint(norms / norms.sum(dtype=np.float64).astype(np.float32) * num_heads)
    steps = 0
    while sizes.sum() > num_heads:
        sizes[sizes.argmax()] -= 1
        steps += 1
    while sizes.sum() < num_heads:
        sizes[sizes.argmin()] += 1
        steps += 1
    assert steps <= len(norms) // 2
    return sizes


def test_published_loops_on_many_random_rows():
    generator = np.random.default_rng(0)
    for groups, num_heads in ((3, 6), (6, 12), (4, 16), (8, 32), (12, 12)):
        rows = generator.uniform(0.5, 1.5, (20_000, groups)).astype(np.float32)
        sizes, _ = ea.allocate_heads(torch.from_numpy(rows), num_heads, **KHAN_KDGQA)
        expected = np.stack([published_loops(row, num_heads) for row in rows])
        assert (sizes.numpy() == expected).all()


def test_published_kdgqa_with_two_key_heads_is_multi_query():
    scores = torch.rand(500, 2) + 0.5
    sizes, _ = ea.allocate_heads(scores, 8, **KHAN_KDGQA)
    assert torch.equal(sizes.sort(-1).values, torch.tensor([[0, 8]]).int().expand(500, -1))
    least = ea.allocate_heads(scores, 8, min_queries=1, **KHAN_KDGQA)[0]
    assert torch.equal(least.sort(-1).values, torch.tensor([[1, 7]]).int().expand(500, -1))


AWKWARD = [0.0, 1.0, 1.0, 1e-38, 3e38, float("nan"), float("inf"), -1.0]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_scores_give_groups_that_add_up(data):
    groups = data.draw(st.integers(1, 9))
    num_heads = data.draw(st.integers(1, 20))
    least = data.draw(st.integers(0, num_heads // groups))
    element = st.one_of(st.floats(0, 100, width=32), st.sampled_from(AWKWARD))
    rows = st.lists(st.lists(element, min_size=groups, max_size=groups), min_size=1, max_size=3)
    scores = torch.tensor(data.draw(rows), dtype=torch.float32)
    for way in WAYS:
        sizes, index = ea.allocate_heads(scores, num_heads, min_queries=least, **way)
        assert sizes.dtype == index.dtype == torch.int32
        assert (sizes >= least).all() and (sizes.sum(-1) == num_heads).all()
        counted = torch.nn.functional.one_hot(index.long(), groups).sum(-2)
        assert torch.equal(counted, sizes.long())
        assert (index.diff(dim=-1) >= 0).all()
        options = (least, way["normalization"] == "minmax", way["rounding"] == "nearest")
        expected = reference.allocate_heads(scores, num_heads, *options)
        assert torch.equal(sizes, expected[0]) and torch.equal(index, expected[1])
        one, _ = ea.allocate_heads(scores[0], num_heads, min_queries=least, **way)
        assert torch.equal(one, sizes[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "scores",
    [
        [2.0] * 4,
        [0.0] * 4,
        [1.0, 1.0, 1.0, 1.0 + 1e-7],
        [1.0, float("nan"), 2.0, 3.0],
        [1.0, float("inf"), 2.0, 3.0],
        [1.0, -1.0, 2.0, 3.0],
    ],
)
def test_scores_that_say_nothing_give_even_groups(way, scores):
    for num_heads, expected in ((8, [2, 2, 2, 2]), (6, [2, 2, 1, 1]), (3, [1, 1, 1, 0])):
        assert sizes_of(scores, num_heads, **way).tolist() == expected


def test_scores_whose_sum_is_too_large_give_even_groups():
    assert sizes_of([3e38, 3e38, 1e38], 6).tolist() == [2, 2, 2]
    assert sizes_of([3e38, 3e38, 1e38], 6, normalization="minmax").tolist() == [3, 3, 0]


def test_quotas_are_exceeded_by_less_than_one():
    scores = torch.rand(300, 7) * 10
    sizes, _ = ea.allocate_heads(scores, 24)
    quotas = scores / scores.sum(-1, keepdim=True) * 24
    assert ((sizes - quotas).abs() < 1).all()
    assert (sizes.gather(1, scores.argsort(1)).diff(dim=1) >= 0).all()  # larger score, no less


def test_order_of_key_heads_goes_along():
    scores, order = torch.rand(50, 6), torch.randperm(6)
    for normalization in ("sum", "minmax"):
        way = {"normalization": normalization}
        sizes, _ = ea.allocate_heads(scores, 13, **way)
        assert torch.equal(ea.allocate_heads(scores[:, order], 13, **way)[0], sizes[:, order])


def test_norms_are_those_of_the_reference_and_do_not_depend_on_threads():
    key = torch.randn(3, 37, 4, 20).transpose(1, 2)
    for lengths in (None, torch.tensor([37, 0, 9])):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            x = key.to(dtype)
            norms = ea.key_norms(x, key_lengths=lengths)
            torch.testing.assert_close(norms, reference.key_norms(x, lengths), rtol=1e-6, atol=0)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ea.key_norms(key))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_padding_does_not_show_in_norms():
    key = torch.randn(2, 3, 50, 16)
    key[0, :, 23:] = torch.nan
    padded = torch.cat([key, key.new_full((2, 3, 300, 16), torch.inf)], dim=2)
    lengths = torch.tensor([23, 50])
    assert torch.equal(
        ea.key_norms(key, key_lengths=lengths), ea.key_norms(padded, key_lengths=lengths)
    )
    assert torch.equal(ea.key_norms(key[:1, :, :23]), ea.key_norms(padded, key_lengths=lengths)[:1])


def test_no_gradient_flows():
    key = torch.randn(2, 3, 5, 8, requires_grad=True)
    sizes, index = ea.allocate_heads(ea.key_norms(key), 6)
    assert not (sizes.requires_grad or index.requires_grad)


def test_moving_average_is_corrected_for_its_beginning():
    norms = torch.rand(20, 4) + 1
    memory, updates = torch.zeros(4), torch.zeros((), dtype=torch.int64)
    plain = np.zeros(4)
    for step, row in enumerate(norms):
        scores, memory = ea.ema_scores(row, memory, updates, beta=0.8)
        updates += 1
        plain = 0.8 * plain + 0.2 * row.numpy()
        np.testing.assert_allclose(scores.numpy(), plain / (1 - 0.8 ** (step + 1)), rtol=1e-5)
    same, _ = ea.ema_scores(norms[0], torch.zeros(4), torch.zeros((), dtype=torch.int64))
    torch.testing.assert_close(same, norms[0])


def test_differences_are_to_the_last_update():
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    scores, memory = ea.difference_scores(first, torch.zeros(2))
    assert torch.equal(scores, first)
    assert torch.equal(ea.difference_scores(second, memory)[0], torch.tensor([0.5, 1.0]))


def test_nothing_is_read_back():
    """Fake tensors have no values, so whatever looked at one would fail."""
    with FakeTensorMode():
        key, lengths = torch.empty(2, 3, 5, 8), torch.empty(2, dtype=torch.int32)
        norms = ea.key_norms(key, key_lengths=lengths)
        sizes, index = ea.allocate_heads(norms, 6, rounding="nearest")
        assert norms.shape == sizes.shape == (2, 3) and index.shape == (2, 6)


def test_one_compilation_serves_all_maps():
    frames = CompileCounter()

    @torch.compile(fullgraph=True, backend=frames)
    def attend(query, key, value):
        _, index = ea.allocate_heads(ea.key_norms(key), 8)
        return ea.attention(query, key, value, head_map=HeadMap.from_index(index, num_k_heads=4))

    found = set()
    for _ in range(100):
        query, value = torch.randn(1, 8, 5, 8), torch.randn(1, 4, 5, 8)
        key = torch.randn(1, 4, 5, 8) * torch.rand(1, 4, 1, 1)
        out = attend(query, key, value)
        sizes, _ = ea.allocate_heads(ea.key_norms(key), 8)
        found.add(tuple(sizes[0].tolist()))
        assert out.isfinite().all()
    assert frames.frame_count == 1 and len(found) > 20


def test_opcheck():
    key = torch.randn(2, 3, 5, 8)
    torch.library.opcheck(torch.ops.efficient_attn.key_norms, (key, torch.tensor([3, 5])))
    torch.library.opcheck(torch.ops.efficient_attn.key_norms, (key, None))
    for way in ((False, False), (True, True)):
        options = (torch.rand(2, 3), 7, 1, *way)
        torch.library.opcheck(torch.ops.efficient_attn.allocate_heads, options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(2, 3, 4), 6), {}, ValueError, r"scores has shape \(2, 3, 4\)"),
        ((torch.ones(0), 6), {}, ValueError, "at least one key head"),
        ((torch.ones(3).int(), 6), {}, TypeError, "int32; pass a floating tensor"),
        (([1.0, 2.0], 6), {}, TypeError, "list; pass a floating tensor"),
        ((torch.ones(3), 0), {}, ValueError, "num_heads is 0"),
        ((torch.ones(3), 6), {"min_queries": 3}, ValueError, "at least 0 to 2 each of 6"),
        ((torch.ones(3), 2), {"min_queries": 1}, ValueError, "at least 0 to 0 each of 2"),
        ((torch.ones(3), 6), {"min_queries": -1}, ValueError, "min_queries is -1"),
        ((torch.ones(3), 6), {"normalization": "max"}, ValueError, "'sum' or 'minmax'"),
        ((torch.ones(3), 6), {"rounding": "up"}, ValueError, "'remainder' or 'nearest'"),
    ],
)
def test_refusals_of_allocation(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ea.allocate_heads(*arguments, **options)


@pytest.mark.parametrize(
    ("key", "lengths", "error", "message"),
    [
        (torch.ones(2, 3, 4), None, ValueError, r"\(batch, heads, tokens, dim\)"),
        (torch.ones(2, 3, 4, 5).long(), None, TypeError, "int64; pass a floating"),
        (torch.ones(2, 3, 4, 5), torch.tensor([5, 1]), ValueError, r"must lie in \[0, 4\]"),
        (torch.ones(2, 3, 4, 5), torch.tensor([1]), ValueError, r"it must be \(2,\)"),
    ],
)
def test_refusals_of_norms(key, lengths, error, message):
    with pytest.raises(error, match=message):
        ea.key_norms(key, key_lengths=lengths)
