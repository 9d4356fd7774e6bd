"""PGQA: the noise, its gradient, and when there is none."""

import copy

import pytest
import torch

import efficient_attn as ea
from efficient_attn import HeadMap, UnsupportedError
from efficient_attn.layers import PGQA, GroupedQueryAttention

EMBED, HEADS, TOKENS = 24, 6, 11


def layer(**options):
    torch.manual_seed(0)
    return PGQA(EMBED, HEADS, **({"num_kv_heads": 3, "dtype": torch.float64} | options))


def tokens(batch=3, **options):
    torch.manual_seed(1)
    return torch.randn(batch, TOKENS, EMBED, **({"dtype": torch.float64} | options))


def heads(module, x, **options):
    """What the heads give before the output projection."""
    module.o_proj = torch.nn.Identity()
    return module(x, **options).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def unperturbed():
    torch.manual_seed(0)
    return GroupedQueryAttention(EMBED, HEADS, num_kv_heads=3, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"noise": "uniform"}, {"compat": "khan2024"}])
def test_mean_becomes_zero_and_variance_doubles(options):
    x = tokens()
    exact = heads(unperturbed(), x)
    blurred = heads(layer(**options), x)
    flat, plain = blurred.flatten(2), exact.flatten(2)
    torch.testing.assert_close(flat.mean(-1), torch.zeros(3, HEADS).double(), rtol=0, atol=1e-12)
    ratio = flat.var(-1) / plain.var(-1)
    # 2 on average; n and o are independent, so their covariance is about 1 / sqrt(44).
    assert (ratio.mean() - 2).abs() < 0.2 and (ratio - 2).abs().max() < 1.2


def test_evaluation_is_exact_unless_asked_for():
    x = tokens()
    exact = unperturbed()(x)
    assert torch.equal(layer().eval()(x), exact)
    for options in ({"in_evaluation": True}, {"compat": "khan2024"}):
        module = layer(**options).eval()
        assert not torch.allclose(module(x), module(x))
    assert torch.equal(layer(compat="khan2024", in_evaluation=False).eval()(x), exact)


@pytest.mark.parametrize("options", [{}, {"noise": "uniform"}, {"compat": "khan2024"}])
def test_the_law_of_the_noise(options):
    noise = layer(**options).draw_noise(torch.empty(2, HEADS, 400, 64))
    assert noise.shape == (HEADS, 400, 64)
    flat = noise.flatten(1).double()
    torch.testing.assert_close(flat.mean(1), torch.zeros(HEADS).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(flat.std(1), torch.ones(HEADS).double(), rtol=1e-4, atol=0)
    kurtosis = flat.pow(4).mean(1)
    assert (kurtosis - (1.8 if options else 3.0)).abs().max() < 0.15
    if options.get("compat"):
        # Of the lowest number a head could have drawn, in the place of its number in the group.
        lowest = flat.argmin(1)
        assert lowest.tolist() == [0, 1, 0, 1, 0, 1]


def test_the_same_seed_draws_the_same_and_samples_share():
    x = tokens(1).expand(3, -1, -1)
    module = layer()
    torch.manual_seed(5)
    one = module(x)
    torch.manual_seed(5)
    assert torch.equal(module(x), one)
    assert not torch.equal(module(x), one)
    torch.testing.assert_close(one[0], one[2])


def test_gradient_is_the_formula():
    """dL/do = g - mean(g) - (o - mu) / ((n - 1) sigma) sum(g noise)."""
    out = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    noise, grad = torch.randn(3, 5, 4).double(), torch.randn(2, 3, 5, 4).double()
    y = ea.perturb_heads(out, noise)
    mu, sigma = out.mean((2, 3), keepdim=True), out.std((2, 3), keepdim=True)
    torch.testing.assert_close(y, out - mu - sigma * noise)
    along = (grad * noise).sum((2, 3), keepdim=True)
    expected = grad - grad.mean((2, 3), keepdim=True) - (out - mu) / (19 * sigma) * along
    torch.testing.assert_close(torch.autograd.grad(y, out, grad)[0], expected)
    lengths = torch.tensor([5, 3])
    assert torch.autograd.gradcheck(lambda o: ea.perturb_heads(o, noise, lengths=lengths), out)


def test_padding_is_left_out_of_the_statistics():
    noise = torch.randn(3, 5, 4)
    out = torch.randn(2, 3, 5, 4)
    out[1, :, 2:] = torch.nan
    y = ea.perturb_heads(out, noise, lengths=torch.tensor([5, 2]))
    torch.testing.assert_close(y[:1], ea.perturb_heads(out[:1], noise))
    torch.testing.assert_close(y[1:, :, :2], ea.perturb_heads(out[1:, :, :2], noise[:, :2]))
    x, lengths = tokens(), torch.tensor([11, 4, 7])
    module = layer()
    torch.manual_seed(3)
    before = module(x, key_lengths=lengths)
    x[1, 4:] += 50
    torch.manual_seed(3)
    after = module(x, key_lengths=lengths)
    torch.testing.assert_close(before[1, :4], after[1, :4])


def test_outputs_that_are_all_alike_have_a_gradient():
    for shape in ((1, 2, 1, 1), (1, 2, 3, 2)):
        out = torch.ones(shape, requires_grad=True)
        y = ea.perturb_heads(out, torch.randn(shape[1:]))
        assert torch.equal(y, torch.zeros(shape))
        assert torch.autograd.grad(y.sum(), out)[0].isfinite().all()


def test_low_precision_stays_low():
    module = layer(dtype=torch.bfloat16)
    x = tokens(dtype=torch.bfloat16)
    assert module(x).dtype == module.draw_noise(torch.empty(1, 6, 2, 4).bfloat16()).dtype
    assert module(x).dtype == torch.bfloat16


def test_compiles_whole_and_trains_every_parameter():
    module = layer()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    x = tokens(requires_grad=True)
    for call in (module, compiled):
        torch.manual_seed(2)
        out = call(x)
        out.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in call.parameters())
        assert call.q_proj.weight.grad.any()
    torch.manual_seed(2)
    torch.testing.assert_close(module(x), out)


def test_refusals():
    with pytest.raises(UnsupportedError, match="over all tokens"):
        layer(causal=True)
    with pytest.raises(ValueError, match="'gaussian' or 'uniform'"):
        layer(noise="normal")
    with pytest.raises(ValueError, match="even groups only"):
        layer(num_kv_heads=None, head_map=HeadMap.from_group_sizes([1, 2, 3]), compat="khan2024")
    with pytest.raises(UnsupportedError, match="padding of context"):
        layer()(tokens(), tokens(), key_lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="the same without batch"):
        ea.perturb_heads(torch.ones(1, 2, 3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"lengths is \[9\]"):
        ea.perturb_heads(torch.ones(1, 2, 3, 4), torch.ones(2, 3, 4), lengths=torch.tensor([9]))
