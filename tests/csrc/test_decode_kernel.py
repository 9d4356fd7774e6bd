"""The parts of native decode that hold no tensors, on every instruction set."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_attn.reference.attention import attention
from efficient_attn.testing import assert_accurate

any_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@any_example
@given(data=st.data(), num_k_heads=st.integers(1, 6), num_v_heads=st.integers(1, 6))
def test_families_cover_the_map_and_share_no_cached_head(host, data, num_k_heads, num_v_heads):
    heads = data.draw(st.integers(0, 14))
    q_to_k, q_to_v = (
        data.draw(st.lists(st.integers(0, n - 1), min_size=heads, max_size=heads))
        for n in (num_k_heads, num_v_heads)
    )
    families = host.head_families(q_to_k, q_to_v, num_k_heads, num_v_heads)
    assert sorted(h for family in families for h in family[0]) == list(range(heads))
    for readers, index in ((1, q_to_k), (2, q_to_v)):
        cached = [head for family in families for head, _, _ in family[readers]]
        assert sorted(cached) == sorted(set(index))
    for members, keys, values, positions in families:
        for head, first, count in keys:
            assert members[first : first + count] == [h for h in members if q_to_k[h] == head]
        for head, first, count in values:
            readers = [members[p] for p in positions[first : first + count]]
            assert readers == [h for h in members if q_to_v[h] == head]
        # Nothing that could be served apart: every key head is linked to the first one.
        linked = {q_to_k[members[0]]}
        for _ in members:
            shared = {q_to_v[h] for h in members if q_to_k[h] in linked}
            linked |= {q_to_k[h] for h in members if q_to_v[h] in shared}
        assert linked == {head for head, _, _ in keys}


def test_exp_on_every_instruction_set(host):
    x = torch.cat([torch.linspace(-87, 0, 20001), -torch.logspace(-8, 1, 2000)])
    beyond = torch.tensor([-87.1, -104.0, -1e30, -math.inf])
    for isa in host.instruction_sets():
        actual = torch.tensor(host.exp(isa, x.tolist()), dtype=torch.float64)
        assert ((actual / x.double().exp() - 1).abs() < 2e-7).all(), isa
        assert host.exp(isa, beyond.tolist()) == [0.0] * 4
        assert math.isnan(host.exp(isa, [math.nan])[0]) and host.exp(isa, [0.0, -0.0]) == [1.0, 1.0]


def test_tanh_on_every_instruction_set(host):
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-20, 2, 2000)])
    x = x[x != 0]
    for isa in host.instruction_sets():
        actual = torch.tensor(host.tanh(isa, x.tolist()), dtype=torch.float64)
        assert ((actual / x.double().tanh() - 1).abs() < 4e-7).all(), isa
        assert host.tanh(isa, [0.0, math.inf, -math.inf]) == [0.0, 1.0, -1.0]
        assert math.isnan(host.tanh(isa, [math.nan])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_attention_on_every_instruction_set(host, dtype, data):
    draw = data.draw
    heads, tokens, count = (
        draw(st.integers(1, 7)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 140)),
    )
    dims = draw(st.tuples(*[st.sampled_from([1, 3, 8, 17, 32, 40, 64, 96, 130])] * 2))
    left = draw(st.sampled_from([-1, 0, 70]))
    softcap, scale = draw(st.sampled_from([0.0, 3.0])), draw(st.sampled_from([0.1, 1.0]))
    query, key, value = (
        torch.randn(1, n, rows, dim).to(dtype)
        for n, rows, dim in ((heads, tokens, dims[0]), (1, count, dims[0]), (1, count, dims[1]))
    )
    options = {
        "causal": True,
        "window": None if left < 0 else (left, 0),
        "scale": scale,
        "softcap": softcap,
    }

    def of(dtype):
        repeated = (x.to(dtype).expand(1, heads, *x.shape[2:]) for x in (key, value))
        return attention(query.to(dtype), *repeated, **options)

    truth, plain = of(torch.float64), of(dtype)
    for isa in host.instruction_sets():
        outs, lses = host.decode_part(
            isa, str(dtype).removeprefix("torch."), query.flatten(0, 2).tolist(),
            key[0, 0].tolist(), value[0, 0].tolist(), tokens, left, scale, softcap,
        )  # fmt: skip
        actual = torch.tensor(outs).view(truth[0].shape), torch.tensor(lses).view(truth[1].shape)
        for a, t, p in zip(actual, truth, plain, strict=True):
            assert_accurate(a, t, p)


def test_attention_on_an_instruction_set_that_is_not_there_is_refused(host):
    with pytest.raises(ValueError, match="does not run AVX-9"):
        host.decode_part("AVX-9", "float32", [[1.0]], [[1.0]], [[1.0]], 1, -1, 1.0, 0.0)
