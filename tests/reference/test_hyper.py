"""The estimator against its equations, and against exact attention where the two must agree."""

import math

import pytest
import torch

from efficient_attn import reference
from efficient_attn.config import HyperConfig
from efficient_attn.planning import make_plan
from efficient_attn.reference.hyper import hyper_attention, multiplicity


def tokens(nq, nk, heads=2, group=1, dim=8, value_dim=8):
    sizes = ((heads * group, nq, dim), (heads, nk, dim), (heads, nk, value_dim))
    return tuple(torch.randn(1, *size, dtype=torch.float64) for size in sizes)


def test_the_equations_by_hand():
    query, key, value = tokens(24, 40, group=2, value_dim=3)
    config = HyperConfig(block_size=4, sample_size=4, leaf_size=4, window=4, exact_below=8)
    plan = make_plan(query, key, causal=True, config=config, seed=0)
    out, lse = hyper_attention(query, key, value, plan, scale=0.3)
    weight = multiplicity(plan, 24, 40, 2)
    for head in range(4):
        for i in (0, 7, 23):
            row = weight[0, head // 2, head % 2, i]
            terms = [
                w * math.exp(0.3 * float(query[0, head, i] @ k))
                for w, k in zip(row.tolist(), key[0, head // 2], strict=True)
            ]
            expected = sum(t * v for t, v in zip(terms, value[0, head // 2], strict=True))
            torch.testing.assert_close(out[0, head, i], expected / sum(terms))
            torch.testing.assert_close(lse[0, head, i].item(), math.log(sum(terms)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        HyperConfig.paper(block_size=64, sample_size=8, exact_below=2),
        HyperConfig.paper(block_size=0, sample_size=64, exact_below=2, replacement=False),
        HyperConfig(block_size=8, sample_size=64, leaf_size=8, window=8, exact_below=2),
        HyperConfig(block_size=0, sample_size=0, leaf_size=64, window=0, exact_below=2),
        HyperConfig(exact_below=65),
    ],
    ids=["one block", "all sampled once", "all sampled once, leaves", "one leaf", "short"],
)
def test_equals_exact_attention_where_nothing_is_left_out(config, causal):
    query, key, value = tokens(40 if causal else 64, 64)
    plan = make_plan(query, key, causal=causal, config=config, seed=0)
    actual = hyper_attention(query, key, value, plan)
    torch.testing.assert_close(actual, reference.attention(query, key, value, causal=causal))


def test_denominator_is_unbiased_with_the_variance_of_the_formula():
    heads, n, m = 400, 128, 16
    query, key, value = (x.expand(-1, heads, -1, -1) for x in tokens(n, n, heads=1))
    config = HyperConfig.paper(block_size=0, sample_size=m, exact_below=2)
    plan = make_plan(query, key, causal=False, config=config, seed=0)
    den = hyper_attention(query, key, value, plan)[1][0].exp()
    terms = (query[0, 0] @ key[0, 0].T * 8**-0.5).exp()
    exact = terms.sum(-1)
    variance = (n * terms.square().sum(-1) - exact.square()) / m
    error = (den.mean(0) - exact) / (variance / heads).sqrt()
    # All rows share a sample, so their errors go together.
    assert error.abs().max() < 4.5
    assert 0.7 < (den.var(0) / variance).mean() < 1.3


def test_drawing_from_intervals_is_no_worse_than_drawing_without_replacement():
    heads, n, m = 400, 128, 64
    query, key, value = (x.expand(-1, heads, -1, -1) for x in tokens(n, n, heads=1))
    den = {}
    for replacement in (True, False):
        config = HyperConfig.paper(
            block_size=0, sample_size=m, exact_below=2, replacement=replacement
        )
        plan = make_plan(query, key, causal=False, config=config, seed=0)
        den[replacement] = hyper_attention(query, key, value, plan)[1][0].exp().var(0).mean()
    expected = (n - m) / (n - 1)
    assert den[False] / den[True] < 1.2 * expected


def test_rows_that_see_nothing_are_zero():
    query, key, value = tokens(60, 40)
    config = HyperConfig(block_size=4, sample_size=4, leaf_size=4, window=4, exact_below=8)
    plan = make_plan(query, key, causal=True, config=config, seed=0)
    out, lse = hyper_attention(query, key, value, plan)
    assert (out[:, :, :20] == 0).all() and (lse[:, :, :20] == -math.inf).all()
    assert lse[:, :, 20:].isfinite().all()


def test_gradcheck():
    inputs = [x.requires_grad_() for x in tokens(5, 8, heads=1, group=2, dim=2, value_dim=1)]
    config = HyperConfig(block_size=2, sample_size=2, leaf_size=2, window=2, exact_below=2)
    plan = make_plan(*inputs[:2], causal=True, config=config, seed=0)
    assert torch.autograd.gradcheck(lambda *x: hyper_attention(*x, plan, scale=2.0), inputs)
