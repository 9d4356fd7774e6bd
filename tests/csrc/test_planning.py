"""Hashing and ordering by hash: what is in common/, and the native ops beside the portable ones."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_attn.planning.hashing import codes, directions, lsh_codes, past_mean
from efficient_attn.planning.ordering import segment_order

any_example = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)


@pytest.mark.parametrize("bits", [1, 7, 16])
def test_codes_are_gray_ranks_of_signs(host, bits):
    projections = torch.randn(50, bits)
    projections[0] = 0.25  # Equal is not above.
    expected = codes(projections, torch.full((bits,), 0.25)).tolist()
    assert [host.sign_code(row, [0.25] * bits) for row in projections.tolist()] == expected


@any_example
@given(data=st.data(), num_bins=st.integers(1, 9))
def test_counting_sort_is_stable(host, data, num_bins):
    bins = data.draw(st.lists(st.integers(0, num_bins - 1), max_size=40))
    order, starts = host.counting_sort(bins, num_bins)
    assert order == sorted(range(len(bins)), key=bins.__getitem__)
    assert starts == [sum(bin < b for bin in bins) for b in range(num_bins + 1)]


@any_example
@given(
    data=st.data(),
    tokens=st.integers(1, 60),
    repeats=st.integers(1, 3),
    first=st.integers(-40, 40),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
)
def test_order(use_native, data, tokens, repeats, first, sizes):
    bins = data.draw(st.sampled_from([1, 2, 6, 301, 2**16 + 1]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    given_codes = torch.randint(bins, (2, 3, repeats * tokens), dtype=torch.int32)
    options = (bins, sizes, tokens, first)
    actual = torch.ops.efficient_attn_native.segment_order(given_codes, *options)
    expected = segment_order(given_codes, *options)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_order_refuses_codes_out_of_range(use_native, wrong):
    with pytest.raises(RuntimeError, match=f"code of {wrong}; pass codes of 0 to 8"):
        torch.ops.efficient_attn_native.segment_order(
            torch.full((1, 1, 4), wrong, dtype=torch.int32), 9, [4], 4, 0
        )


@any_example
@given(
    tokens=st.integers(1, 700),
    dim=st.sampled_from([1, 8, 40, 64]),
    bits=st.sampled_from([1, 7, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    mean=st.sampled_from([None, "all", "past", "past and own"]),
    first=st.integers(-50, 50),
    seed=st.integers(0, 2**16),
)
def test_codes(use_native, tokens, dim, bits, dtype, mean, first, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, tokens, 3, dim).to(dtype).transpose(1, 2)
    normals = directions(seed, dim, 16, x.device)
    leaf, own = 0 if mean in (None, "all") else 24, mean == "past and own"
    options = (normals, bits, mean is not None, leaf, first, own)
    assert_same_codes(torch.ops.efficient_attn_native.lsh_codes(x, *options), x, options)


def assert_same_codes(actual, x, options):
    """They are those of the portable op in every bit that rounding does not decide."""
    expected = lsh_codes(x, *options)
    normals, bits, center, leaf, first, own = options
    tokens, side = x.shape[2], x.float() @ normals[:, :bits]
    if leaf:
        number = (torch.arange(tokens, device=x.device) + first).clamp(min=0) // leaf
        side = side - past_mean(side, number, int(number.max()) + 1, own)
    elif center:
        side = side - side.mean(-2, keepdim=True)
    certain = (side.abs() > 1e-4).all(-1)
    assert tokens < 100 or certain.float().mean() > 0.9
    assert torch.equal(actual[certain], expected[certain])
    assert (actual >= 0).all() and (actual < 2**bits).all()
