"""The native `hyper_attention` and its gradient against the fp64 reference, on one plan."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_attn import HyperConfig, hyper_plan, reference
from efficient_attn.testing import assert_accurate

any_example = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
SMALL = {"block_size": 16, "sample_size": 12, "exact_below": 24}
CONFIGS = {
    "published": HyperConfig.paper(**SMALL),
    "default": HyperConfig(**SMALL, leaf_size=20, window=24, sinks=3),
    "no samples": HyperConfig(**SMALL | {"sample_size": 0}, leaf_size=20, window=0, sinks=0),
    "no blocks": HyperConfig(**SMALL | {"block_size": 0}, leaf_size=33, window=7, sinks=2),
    "one leaf": HyperConfig(**SMALL, leaf_size=700, window=0),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def native(use_native):
    return torch.ops.efficient_attn_native


@st.composite
def cases(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    # One key has gradients of zero, of which no error is a share.
    nk = draw(st.integers(2, 400))
    return {
        "config": draw(st.sampled_from(sorted(CONFIGS))),
        "causal": draw(st.booleans()),
        "heads": (kv_heads * group, kv_heads),
        "tokens": (draw(st.one_of(st.just(nk), st.integers(1, 400))), nk),
        "dims": draw(st.sampled_from([(16, 16), (64, 64), (40, 24), (8, 80)])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "by_token": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def make(config, causal, heads, tokens, dims, dtype, by_token, seed):
    torch.manual_seed(seed)

    def random(heads, tokens, dim):
        shape = (2, tokens, heads, dim) if by_token else (2, heads, tokens, dim)
        x = torch.randn(shape).to(dtype)
        return x.transpose(1, 2) if by_token else x

    inputs = [
        random(h, n, d)
        for h, n, d in zip(
            (heads[0], heads[1], heads[1]), (*tokens, tokens[1]), (*dims[:1] * 2, dims[1]),
            strict=True,
        )
    ]  # fmt: skip
    plan = hyper_plan(*inputs[:2], causal=causal, config=CONFIGS[config], seed=seed)
    return inputs, plan, dims[0] ** -0.5


@any_example
@given(case=cases())
def test_forward(native, case):
    inputs, plan, scale = make(**case)
    actual = native.hyper_attention(*inputs, *plan, scale)
    truth = reference.hyper_attention(*(x.double() for x in inputs), plan)
    plain = reference.hyper_attention(*inputs, plan)
    for a, t, p in zip(actual, truth, plain, strict=True):
        assert_accurate(a, t, p)


@any_example
@given(case=cases(), of_lse=st.booleans())
def test_backward(native, case, of_lse):
    inputs, plan, scale = make(**case)
    out, lse = native.hyper_attention(*inputs, *plan, scale)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse) if of_lse else None

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out, lse = reference.hyper_attention(*leaves, plan)
        loss = (out * grad_out.to(dtype)).sum()
        if of_lse:
            seen = lse != -torch.inf
            loss = loss + (lse * grad_lse.to(dtype))[seen].sum()
        return torch.autograd.grad(loss, leaves)

    actual = native.hyper_attention_backward(grad_out, grad_lse, *inputs, out, lse, *plan, scale)
    for a, t, p in zip(actual, gradients(torch.float64), gradients(inputs[0].dtype), strict=True):
        assert_accurate(a, t, p)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("part", ["exact_part", "sampled_part"])
@pytest.mark.usefixtures("poisoned_memory")
def test_parts_of_a_plan(native, part, causal):
    inputs, plan, scale = make(**CASE | {"causal": causal, "dtype": torch.float64})
    plan = getattr(plan, part)()
    leaves = [x.requires_grad_() for x in inputs]
    expected = reference.hyper_attention(*leaves, plan)
    grad_out = torch.randn_like(expected[0])
    grads = torch.autograd.grad(expected[0], leaves, grad_out)
    with torch.no_grad():
        actual = native.hyper_attention(*inputs, *plan, scale)
        torch.testing.assert_close(actual, expected)
        back = native.hyper_attention_backward(grad_out, None, *inputs, *actual, *plan, scale)
    torch.testing.assert_close(back, grads)


CASE = {
    "config": "default", "causal": True, "heads": (4, 2), "tokens": (900, 900), "dims": (16, 16),
    "dtype": torch.float32, "by_token": True, "seed": 5,
}  # fmt: skip


@pytest.mark.parametrize("config", ["default", "published"])
def test_results_do_not_depend_on_the_number_of_threads(native, config):
    inputs, plan, scale = make(**CASE | {"config": config})
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            out, lse = native.hyper_attention(*inputs, *plan, scale)
            grads = native.hyper_attention_backward(
                out.cos(), None, *inputs, out, lse, *plan, scale
            )
            results.append((out, lse, *grads))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("field", ["key_order", "sample_keys", "block_rows"])
def test_a_plan_that_names_what_is_not_there_is_refused(native, field):
    inputs, plan, scale = make(**CASE)
    wrong = getattr(plan, field).clone()
    wrong[wrong >= 0] = 10**6
    with pytest.raises(RuntimeError, match="does not exist"):
        native.hyper_attention(*inputs, *plan._replace(**{field: wrong}), scale)


def test_a_plan_of_another_shape_is_refused(native):
    inputs, plan, scale = make(**CASE)
    short = plan._replace(band_end=plan.band_end[..., :-1])
    with pytest.raises(RuntimeError, match="band_end"):
        native.hyper_attention(*inputs, *short, scale)
