"""What HyperAttention says of its own error."""

import math

import pytest
import torch

import efficient_attn as ea
from efficient_attn import HyperConfig, reference

OPTIONS = {"block_size": 0, "sample_size": 32, "exact_below": 2, "max_sample_mass": None}
CONFIGS = {
    "paper": HyperConfig.paper(block_size=32, sample_size=32, exact_below=128),
    "intervals": HyperConfig(**OPTIONS, leaf_size=32, window=32, sinks=4),
    "with replacement": HyperConfig(**OPTIONS, leaf_size=32, window=0, sinks=0, replacement=True),
    "blocks": HyperConfig(**OPTIONS | {"block_size": 32}, leaf_size=32, window=0),
}


def clustered(heads, n, dim=16, clusters=16):
    centres = torch.randn(clusters, dim)
    return (
        centres[torch.randint(clusters, (1, heads, n))] + torch.randn(1, heads, n, dim) / 2,
    ) * 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_standard_error_is_the_spread_over_plans(name, causal):
    """One row's denominator over many heads with the same tokens, which draw independently."""
    heads, n = 200, 512
    inputs = [torch.randn(1, 1, n, 16).expand(-1, heads, -1, -1) for _ in range(2)]
    _, lse, error = ea.hyper_attention(
        *inputs, inputs[1], causal=causal, config=CONFIGS[name], return_lse=True, return_error=True
    )
    _, exact = ea.attention(*(x[:, :1] for x in (*inputs, inputs[1])), causal=causal,
                            return_lse=True)  # fmt: skip
    late = slice(n // 2, None)
    spread = ((lse - exact).exp() - 1).square().mean(1).sqrt()[:, late]
    said = (error * (lse - exact).exp()).square().mean(1).sqrt()[:, late]
    # Intervals spread a little less than what is drawn without replacement.
    assert 0.85 < (said.mean() / spread.mean()) < 1.2


@pytest.mark.parametrize("data", ["random", "clustered"])
def test_two_standard_errors_hold_the_truth_nineteen_times_in_twenty(data):
    n, heads = 1024, 16
    query, key = (
        [torch.randn(1, heads, n, 16) for _ in range(2)]
        if data == "random"
        else clustered(heads, n)
    )
    config = HyperConfig(
        **OPTIONS | {"block_size": 64, "sample_size": 128}, leaf_size=64, window=64
    )
    _, lse, error = ea.hyper_attention(
        query, key, key, config=config, return_lse=True, return_error=True
    )
    _, exact = ea.attention(query, key, key, return_lse=True)
    deviation = (1 - (exact - lse).exp()).abs() / error
    assert 0.88 < (deviation < 2).double().mean() < 0.99


def test_what_is_certain_has_no_error():
    query, key, value = torch.randn(3, 1, 2, 256, 16)
    for config in (
        HyperConfig(),
        HyperConfig(block_size=0, sample_size=0, leaf_size=32, exact_below=2),
        HyperConfig(block_size=0, sample_size=256, leaf_size=32, window=0, exact_below=2),
    ):
        error = ea.hyper_attention(query, key, value, config=config, return_error=True)[1]
        assert error.shape == (1, 2, 256) and (error == 0).all()


def test_the_formula_by_hand():
    """For the one sample of a published plan."""
    query, key = torch.randn(2, 1, 1, 64, 8, dtype=torch.float64)
    config = HyperConfig.paper(block_size=0, sample_size=16, exact_below=2)
    plan = ea.hyper_plan(query, key, config=config)
    _, lse, error = ea.hyper_attention(
        query, key, key, plan=plan, return_lse=True, return_error=True
    )
    terms = 4 * (query[0, 0] @ key[0, 0, plan.sample_keys[0, 0].long()].T * 8**-0.5).exp()
    expected = (16 * terms.var(-1) * (1 - 1 / 4)).sqrt() / terms.sum(-1)
    torch.testing.assert_close(error[0, 0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_heads_over_the_budget_are_exact_with_gradients(causal):
    # The second head's scores are far apart, so no sample is a good one.
    query = torch.randn(2, 4, 256, 16) * torch.tensor([0.1, 4.0, 0.1, 4.0]).view(4, 1, 1)
    inputs = [query, torch.randn(2, 2, 256, 16), torch.randn(2, 2, 256, 16)]
    inputs = [x.requires_grad_() for x in inputs]
    options = dict(block_size=32, sample_size=32, leaf_size=32, window=0, exact_below=2)
    results = {
        budget: ea.hyper_attention(
            *inputs, causal=causal, config=HyperConfig(**options, max_error=budget),
            return_lse=True, return_error=True,
        )
        for budget in (None, 0.1, 1e9)
    }  # fmt: skip
    torch.testing.assert_close(results[None], results[1e9])
    out, lse, error = results[0.1]
    is_exact = error.amax(-1) == 0
    assert is_exact.tolist() == [[False, True, False, True]] * 2
    truth, truth_lse = reference.attention(*inputs, causal=causal)
    torch.testing.assert_close(out[is_exact], truth[is_exact])
    torch.testing.assert_close(lse[is_exact], truth_lse[is_exact])
    torch.testing.assert_close(out[~is_exact], results[None][0][~is_exact])
    grads = [torch.autograd.grad(x[is_exact].square().sum(), inputs) for x in (out, truth)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_samples_of_different_lengths_have_their_own_error():
    query, key, value = torch.randn(3, 2, 2, 128, 16)
    config = HyperConfig(**OPTIONS, leaf_size=16, window=0, sinks=0)
    out, error = ea.hyper_attention(
        query, key, value, config=config, key_lengths=torch.tensor([128, 90]), return_error=True
    )
    alone = ea.hyper_attention(
        query[1:, :, :90], key[1:, :, :90], value[1:, :, :90], config=config, return_error=True
    )
    torch.testing.assert_close((out[1:, :, :90], error[1:, :, :90]), alone)
    assert error.isfinite().all() and not math.isclose(float(error.sum()), 0.0)


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (-1.0, ValueError), ("1", TypeError)])
@pytest.mark.parametrize("name", ["max_error", "max_sample_mass"])
def test_refused(name, value, kind):
    with pytest.raises(kind, match=f"{name} is"):
        HyperConfig(**{name: value})
