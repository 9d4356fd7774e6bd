"""HyperAttention is the grouped layer around hyper_attention, and says when it is exact."""

import copy
import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from efficient_attn import HyperConfig, UnsupportedError, hyper_attention
from efficient_attn.cache import StaticCache
from efficient_attn.layers import GroupedQueryAttention, HyperAttention, RotaryEmbedding

EMBED, HEADS = 32, 4
CONFIG = HyperConfig(block_size=8, sample_size=8, leaf_size=8, window=8, sinks=2, exact_below=48)
LONG, SHORT = 70, 47

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(**options):
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "config": CONFIG, "dtype": torch.float64} | options
    return HyperAttention(EMBED, HEADS, **options)


def tokens(count=LONG, batch=2, **options):
    torch.manual_seed(1)
    return 2 * torch.randn(batch, count, EMBED, **({"dtype": torch.float64} | options))


def exact_twin(module):
    """The exact layer with the same weights."""
    twin = GroupedQueryAttention(
        EMBED, HEADS, num_kv_heads=2, causal=module.causal, rotary=module.rotary,
        dtype=torch.float64,
    )  # fmt: skip
    twin.load_state_dict(module.state_dict())
    return twin


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_op_between_the_projections_and_no_more(causal):
    rotary = RotaryEmbedding(EMBED // HEADS)
    module = layer(causal=causal, rotary=rotary, seed=5)
    x = tokens()
    q, k, v = module.project(x, x)
    out = hyper_attention(rotary(q), rotary(k), v, causal=causal, config=CONFIG, seed=5)
    assert torch.equal(module(x), module.combine(out))
    assert not torch.allclose(module(x), exact_twin(module)(x), atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_short_sequences_are_exact_to_the_bit_and_take_a_bias(causal):
    module = layer(causal=causal)
    x = tokens(SHORT)
    assert module.is_exact(SHORT, SHORT) and not module.is_exact(LONG, LONG)
    bias = torch.randn(1, HEADS, SHORT, SHORT, dtype=torch.float64)
    for given in (None, bias):
        assert torch.equal(module(x, bias=given), exact_twin(module)(x, bias=given))
    with pytest.raises(UnsupportedError, match="bias is given, and 70 keys are estimated"):
        module(tokens(), bias=torch.zeros(1, 1, 1, LONG, dtype=torch.float64))


def test_a_cache_is_decoded_exactly_and_a_long_prompt_estimated():
    """Step by step after the prompt, the rows are those that exact attention has for this cache."""
    module = layer(causal=True, rotary=RotaryEmbedding(EMBED // HEADS))
    twin, x = exact_twin(module), tokens()
    caches = [StaticCache(module.cache_rows, 2, 96, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        prompt = module(x[:, :60], cache=caches[0])
        assert torch.equal(prompt, module(x[:, :60])), "the prompt is what it is without a cache"
        twin(x[:, :60], cache=caches[1])
        for at in (slice(60, 61), slice(61, 70)):
            ours, exact = (
                m(x[:, at], cache=c) for m, c in zip((module, twin), caches, strict=True)
            )
            assert torch.equal(ours, exact)
        long = tokens(20)
        ours, exact = (m(long, cache=c) for m, c in zip((module, twin), caches, strict=True))
        assert not torch.allclose(ours, exact, atol=1e-3)


def test_key_lengths_equal_cutting_each_sample():
    module = layer()
    x = tokens()
    out = module(x, key_lengths=torch.tensor([LONG, 55]))
    torch.testing.assert_close(out[1:, :55], module(x[1:, :55]))
    torch.testing.assert_close(out[:1], module(x[:1]))


def test_checkpointing_saving_and_copying_repeat_the_bits(tmp_path):
    module = layer(causal=True, seed=3)
    x = tokens(requires_grad=True)
    out = module(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.randn(7)  # what a global generator would have moved on from
    again = checkpoint(module, x, use_reentrant=False)
    assert torch.equal(again, out)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], grad)
    torch.save(module.state_dict(), tmp_path / "layer.pt")
    loaded = layer(causal=True, seed=3)
    torch.nn.init.zeros_(loaded.q_proj.weight)
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt"))
    for same in (loaded, copy.deepcopy(module)):
        assert torch.equal(same(x), out)
    # A sample does not depend on its batch.
    torch.testing.assert_close(module(x[:1]), out[:1])
    assert not torch.allclose(layer(causal=True, seed=4)(x), out)


def test_earlier_tokens_do_not_depend_on_later_ones():
    module = layer(causal=True)
    x = tokens()
    changed = x.clone()
    changed[:, 61:] += 1
    torch.testing.assert_close(module(changed)[:, :61], module(x)[:, :61], rtol=1e-12, atol=1e-12)


def test_it_trains_every_parameter():
    module = layer(causal=True)
    module(tokens()).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Every score of a query gains the same from a bias of the keys, so it has no part.
        assert name == "k_proj.bias" or parameter.grad.abs().max() > 1e-6, name


def test_compiles_whole():
    module = layer(causal=True, dtype=torch.float32)
    x = tokens(dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


def test_refusals_and_what_is_shown():
    with pytest.raises(UnsupportedError) as error:
        layer(window=(4, 0), softcap=2.0)
    assert len(error.value.reasons) == 2
    with pytest.raises(TypeError, match="config is a str; pass a HyperConfig"):
        layer(config="paper")
    shown = repr(layer(seed=9))
    assert "seed=9" in shown and "block_size=8" in shown


def test_heads_over_the_budget_are_exact_and_counted():
    x = tokens(batch=3)
    for max_error, count in ((1e-9, 3 * HEADS), (1e9, 0)):
        config = dataclasses.replace(CONFIG, max_error=max_error)
        module = layer(causal=True, config=config)
        assert module.exact_heads is None
        out = module(x)
        assert module.exact_heads.item() == count
    assert torch.equal(out, layer(causal=True)(x))
