"""`merge_states`: the reference, gradients, and parts that saw nothing."""

import pytest
import torch
import torch.utils.checkpoint

import efficient_attn as ea
from efficient_attn import reference


def parts(count, dtype=torch.float64, requires_grad=False):
    outs = [torch.randn(2, 3, 5, dtype=dtype) for _ in range(count)]
    lses = [
        torch.randn(2, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for _ in range(count)
    ]
    for x in (*outs, *lses):
        x.requires_grad_(requires_grad)
    return outs, lses


@pytest.mark.parametrize("count", [1, 2, 5])
def test_agrees_with_the_reference_and_its_gradient(count):
    outs, lses = parts(count, requires_grad=True)
    actual, expected = ea.merge_states(outs, lses), reference.merge_states(outs, lses)
    torch.testing.assert_close(actual, expected)
    assert torch.autograd.gradcheck(
        lambda *x: ea.merge_states(x[:count], x[count:]), (*outs, *lses)
    )


def test_parts_that_saw_nothing_do_not_count():
    outs, lses = parts(3)
    lses[1][0] = lses[2][1, 1] = -torch.inf
    outs[1][0] = 0
    for lse in lses:
        lse[1, 2] = -torch.inf
    for out in outs:
        out[1, 2] = 0
    out, lse = ea.merge_states(outs, lses)
    torch.testing.assert_close((out, lse), reference.merge_states(outs, lses))
    assert (out[1, 2] == 0).all() and lse[1, 2] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_in_single_precision(dtype):
    outs, lses = parts(4, dtype)
    out, lse = ea.merge_states(outs, lses)
    truth, _ = reference.merge_states([x.double() for x in outs], [x.double() for x in lses])
    assert out.dtype == dtype and lse.dtype == torch.float32
    # One rounding to the output's precision.
    torch.testing.assert_close(out.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_what_is_refused():
    outs, lses = parts(2)
    with pytest.raises(ValueError, match="at least one part"):
        ea.merge_states([], [])
    with pytest.raises(ValueError, match="one lse for every out"):
        ea.merge_states(outs, lses[:1])
    with pytest.raises(ValueError, match="part 1"):
        ea.merge_states([outs[0], outs[1][:1]], lses)


def test_gradients_under_checkpointing():
    outs, lses = parts(2, requires_grad=True)
    merged = torch.utils.checkpoint.checkpoint(
        lambda *x: ea.merge_states(x[:2], x[2:]), *outs, *lses, use_reentrant=False
    )
    got = torch.autograd.grad(merged[0].cos().sum() + merged[1].sum(), (*outs, *lses))
    out, lse = ea.merge_states(outs, lses)
    expected = torch.autograd.grad(out.cos().sum() + lse.sum(), (*outs, *lses))
    torch.testing.assert_close(got, expected)
