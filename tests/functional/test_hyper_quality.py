"""What the estimate is worth, and what it costs in memory."""

import math

import pytest
import torch

import efficient_attn as ea
from bench.measure import peak_bytes
from efficient_attn import HyperConfig


def relative_errors(query, key, config, seed=0):
    """Of the softmax denominator, row by row."""
    _, lse = ea.hyper_attention(query, key, key, config=config, seed=seed, return_lse=True)
    _, exact = ea.attention(query, key, key, return_lse=True)
    return torch.expm1(lse - exact)


def test_the_error_falls_with_the_root_of_the_sample_size():
    query, key = torch.randn(1, 24, 128, 64), torch.randn(1, 24, 2048, 64)
    sizes = (64, 128, 256, 512, 1024)
    rms = []
    for size in sizes:
        config = HyperConfig.paper(block_size=128, sample_size=size, exact_below=2)
        rms.append(float(relative_errors(query, key, config).square().mean().sqrt()))
    logs = [torch.tensor(x).double().log() for x in (sizes, rms)]
    x, y = (values - values.mean() for values in logs)
    assert -0.6 < float((x * y).sum() / x.square().sum()) < -0.4
    # Normal scores of unit variance: the coefficient of variation is sqrt(e - 1), of which the
    # block takes a little.
    assert 0.070 < rms[2] < 0.085


def clusters(n, offset=0.0, dim=64, number=64):
    """Queries and keys around the same centres, equally many around each, in any order."""
    centres = torch.randn(number, dim)
    return [
        (centres[torch.randperm(n) % number] + 0.2 * torch.randn(n, dim) + shift)[None, None]
        for shift in (offset * torch.nn.functional.normalize(torch.randn(2, dim), dim=-1))
    ]


@pytest.mark.parametrize(("offset", "center", "least"), [(0.0, False, 0.45), (16.0, True, 0.30)])
def test_blocks_capture_planted_mass(offset, center, least):
    query, key = clusters(4096, offset)
    captured = {}
    for centered in (center, False):
        config = HyperConfig.paper(sample_size=0, center=centered)
        captured[centered] = float(1 + relative_errors(query, key, config).mean())
    # Any block of 256 captures a sixteenth.
    assert captured[center] > least
    if offset:
        assert captured[False] < 0.5 * captured[True]


def local_tokens(n, heads=8, dim=32, length=32):
    """Tokens that change slowly, so that most of a query's mass lies just before it."""
    keep = math.exp(-1 / length)
    x = torch.randn(n, heads, dim)
    for i in range(1, n):
        x[i] = keep * x[i - 1] + math.sqrt(1 - keep**2) * x[i]
    return (3 * torch.nn.functional.normalize(x, dim=-1)).transpose(0, 1)[None]


def test_the_first_queries_of_a_leaf_are_as_good_as_those_inside():
    leaf, n = 128, 2048
    tokens = local_tokens(n)
    value = torch.randn(1, 8, n, 32)
    exact = ea.attention(tokens, tokens, value, causal=True, scale=1.0)
    ratio = {}
    for name, config in {
        "default": HyperConfig(),
        "paper": HyperConfig.paper(block_size=128, sample_size=128, exact_below=leaf),
    }.items():
        out = ea.hyper_attention(tokens, tokens, value, causal=True, scale=1.0, config=config)
        error = (out - exact).norm(dim=-1).unflatten(-1, (-1, leaf))[:, :, 4:].mean((0, 1, 2))
        ratio[name] = float(error[:8].mean() / error[leaf // 2 :].mean())
    assert ratio["default"] < 1.5
    # The published recursion leaves the first queries of a leaf without what is before them.
    assert ratio["paper"] > 2


@pytest.mark.parametrize("causal", [False, True])
def test_leaves_give_the_same_in_few_runs_and_in_many(causal, monkeypatch):
    config = HyperConfig(block_size=16, sample_size=16, leaf_size=16, window=16, exact_below=2)
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 2, 200, 16)]
    results = []
    for elements in (1 << 22, 3 * 16 * 32, 1):
        monkeypatch.setattr("efficient_attn.kernels.portable.leaves._ELEMENTS", elements)
        out = ea.hyper_attention(*inputs, causal=causal, config=config)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize(
    ("config", "causal", "outputs"),
    [
        (HyperConfig.paper(), False, 1.5),
        (HyperConfig.paper(), True, 1.5),
        (HyperConfig(), False, 1.5),
        (HyperConfig(), True, 1.75),
    ],
    ids=["paper, full", "paper, causal", "default, full", "default, causal"],
)
def test_memory_at_131072_tokens_is_a_few_outputs_and_ids(config, causal, outputs):
    n = 131072
    query, key, value = torch.randn(3, 1, n, 2, 64).transpose(2, 3)
    plan = ea.hyper_plan(query, key, causal=causal, config=config)
    ids = sum(x.nbytes for x in plan if isinstance(x, torch.Tensor))

    def call():
        return ea.hyper_attention(query, key, value, causal=causal, config=config)

    extra = peak_bytes(call, "cpu") - value.nbytes
    assert extra < outputs * value.nbytes + ids
