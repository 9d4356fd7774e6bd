"""Hashing and ordering by hash: what is in common/, and the native ops beside the portable ones."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_attn.planning.hashing import codes, directions, lsh_codes, past_mean
from efficient_attn.planning.ordering import NOWHERE, segment_order

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
    most = data.draw(st.sampled_from([0, 1, 5, 300, NOWHERE]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    given_codes = torch.randint(most + 1, (2, 3, repeats * tokens), dtype=torch.int32)
    actual = torch.ops.efficient_attn_native.segment_order(given_codes, sizes, tokens, first)
    expected = segment_order(given_codes, sizes, tokens, first)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_order_refuses_codes_out_of_range(use_native):
    with pytest.raises(RuntimeError, match="code of -1"):
        torch.ops.efficient_attn_native.segment_order(
            torch.full((1, 1, 4), -1, dtype=torch.int32), [4], 4, 0
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
    """They agree in every bit that rounding does not decide."""
    torch.manual_seed(seed)
    x = torch.randn(2, tokens, 3, dim).to(dtype).transpose(1, 2)
    normals = directions(seed, dim, 16, x.device)
    leaf, own = 0 if mean in (None, "all") else 24, mean == "past and own"
    options = (normals, bits, mean is not None, leaf, first, own)
    actual = torch.ops.efficient_attn_native.lsh_codes(x, *options)
    expected = lsh_codes(x, *options)
    side = x.float() @ normals[:, :bits]
    if leaf:
        number = (torch.arange(tokens) + first).clamp(min=0) // leaf
        side = side - past_mean(side, number, int(number.max()) + 1, own)
    elif mean == "all":
        side = side - side.mean(-2, keepdim=True)
    certain = (side.abs() > 1e-4).all(-1)
    assert torch.equal(actual[certain], expected[certain])
    assert (actual >= 0).all() and (actual < 2**bits).all()
