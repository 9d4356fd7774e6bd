"""One test per defect of the published code, each of which that code fails.

B4 (the order of buckets) is in tests/planning, B13 (a name that hides a method of modules) belongs
to the layer, and B21 onwards is about scripts.
"""

import pytest
import torch

import efficient_attn as ea
from efficient_attn import HeadMap, HyperConfig, reference
from efficient_attn.testing import qkv

PAPER = HyperConfig.paper(block_size=16, sample_size=16, exact_below=32)


def outputs(query, key, value, causal=False, config=PAPER, **options):
    return ea.hyper_attention(
        query, key, value, causal=causal, config=config, return_lse=True, **options
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_b1_b2_keys_of_the_block_are_not_counted_again_as_samples(dtype):
    n, heads = 128, 64
    zeros = torch.zeros(1, heads, n, 16, dtype=dtype)
    key = torch.randn(1, 1, n, 16, dtype=dtype).expand_as(zeros)
    _, lse = outputs(zeros, key, key)
    den = lse.double().exp()
    # Counted twice, the average would be n + block_size.
    assert abs(den.mean() - n) < 4 * den.mean(-1).std() / heads**0.5 + 1e-3
    assert (den <= PAPER.block_size + n + 1e-2).all()


@pytest.mark.parametrize("length", [65, 100, 127])
def test_b3_padding_does_not_enter_the_denominator(length):
    query, key, value = qkv(HeadMap.mha(2), lengths=(length, length))
    # With scores far below zero, a padded key with score zero would be all that counts.
    out, lse = outputs(query.abs(), -key.abs(), torch.ones_like(value), scale=20.0)
    torch.testing.assert_close(out, torch.ones_like(out))
    assert (lse < 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_b5_gradients_flow_through_the_weights_of_the_merge(causal):
    inputs = qkv(HeadMap.mha(2), lengths=(128, 128), dtype=torch.float64, requires_grad=True)
    plan = ea.hyper_plan(*inputs[:2], causal=causal, config=PAPER)
    out = ea.hyper_attention(*inputs, causal=causal, plan=plan, scale=2.0)
    expected, _ = reference.hyper_attention(*inputs, plan, scale=2.0)
    weight = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, weight), torch.autograd.grad(expected, inputs, weight)
    )


@pytest.mark.parametrize("nats", [0.0, 20.0, 50.0, 100.0, -100.0])
def test_b6_b7_parts_of_any_difference_merge_to_the_right_lse_and_gradients(nats):
    n = 128
    query, key = torch.ones(1, 1, n, 1), torch.zeros(1, 1, n, 1)
    # The last leaf looks back at keys that differ from its own by that many nats.
    key[:, :, : n // 2] = nats
    inputs = [x.requires_grad_() for x in (query, key, torch.randn(1, 1, n, 1))]
    plan = ea.hyper_plan(query, key, causal=True, config=PAPER)
    out, lse = ea.hyper_attention(*inputs, causal=True, plan=plan, scale=1.0, return_lse=True)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.hyper_attention(*doubles, plan, scale=1.0)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=1e-4)
    grads = torch.autograd.grad(out.sum() + lse.sum(), inputs)
    truth = torch.autograd.grad(expected[0].sum() + expected[1].sum(), doubles)
    for grad, true in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad.double(), true, rtol=1e-3, atol=1e-3)


def test_b8_nothing_of_queries_times_samples_is_saved_for_the_backward():
    n, m = 2048, 512
    query, key, value = qkv(HeadMap.mha(1), 1, (n, n), (8, 8), requires_grad=True)
    config = HyperConfig.paper(block_size=64, sample_size=m, exact_below=64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda x: x):
        outputs(query, key, value, config=config)
    assert max(saved) < n * m / 8


def test_b9_query_heads_share_key_heads():
    query, key, value = qkv(HeadMap.gqa(8, 2), lengths=(96, 96), dtype=torch.float64)
    plan = ea.hyper_plan(query, key, config=PAPER)
    actual = ea.hyper_attention(query, key, value, plan=plan, return_lse=True)
    torch.testing.assert_close(actual, reference.hyper_attention(query, key, value, plan))


def test_b10_causal_is_aligned_to_the_last_key():
    query, key, value = qkv(HeadMap.mha(2), lengths=(1, 100), dtype=torch.float64)
    config = HyperConfig.paper(block_size=128, sample_size=0, exact_below=128)
    out, _ = outputs(query, key, value, causal=True, config=config)
    torch.testing.assert_close(out, ea.attention(query, key, value))


@pytest.mark.parametrize("lengths", [(96, 144), (144, 96), (100, 37), (33, 200)])
@pytest.mark.parametrize("causal", [False, True])
def test_b11_numbers_of_queries_and_keys_may_differ(lengths, causal):
    query, key, value = qkv(HeadMap.mha(2), lengths=lengths, dtype=torch.float64)
    plan = ea.hyper_plan(query, key, causal=causal, config=PAPER)
    actual = ea.hyper_attention(query, key, value, causal=causal, plan=plan, return_lse=True)
    torch.testing.assert_close(actual, reference.hyper_attention(query, key, value, plan))


def test_b12_values_may_be_of_another_width():
    query, key, value = qkv(HeadMap.mha(2), lengths=(96, 96), dims=(16, 24))
    assert outputs(query, key, value)[0].shape == (2, 2, 96, 24)


@pytest.mark.parametrize("causal", [False, True])
def test_b14_a_seed_fixes_everything_and_no_global_generator_is_used(causal):
    inputs = qkv(HeadMap.mha(2), lengths=(128, 128))
    first = outputs(*inputs, causal=causal, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(123)
    again = outputs(*inputs, causal=causal, seed=5)
    other = outputs(*inputs, causal=causal, seed=6)
    torch.set_rng_state(state)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("bits", [0, -1, 17, 2.0])
def test_b15_a_number_of_projections_that_makes_no_hash_is_refused(bits):
    with pytest.raises((ValueError, TypeError), match="num_projections"):
        HyperConfig.paper(num_projections=bits)


@pytest.mark.parametrize("causal", [False, True])
def test_b16_sizes_of_zero_mean_none_and_large_ones_everything(causal):
    query, key, value = qkv(HeadMap.mha(2), lengths=(96, 96), dtype=torch.float64)
    for change in ({"block_size": 0}, {"sample_size": 0}):
        config = HyperConfig.paper(
            **{"block_size": 16, "sample_size": 16, **change}, exact_below=32
        )
        out, lse = outputs(query, key, value, causal=causal, config=config)
        assert out.isfinite().all() and lse.isfinite().all()
    large = HyperConfig.paper(block_size=1000, sample_size=1000, exact_below=32)
    out, _ = outputs(query, key, value, causal=causal, config=large)
    torch.testing.assert_close(out, ea.attention(query, key, value, causal=causal))
    for name in ("block_size", "sample_size"):
        with pytest.raises(ValueError, match=f"{name} is -1"):
            HyperConfig.paper(**{name: -1})


@pytest.mark.parametrize("layout", ["tokens", "heads", "strided", "broadcast"])
def test_b18_strides_do_not_matter(layout):
    inputs = qkv(HeadMap.gqa(4, 2), lengths=(96, 96), dtype=torch.float64, layout=layout)
    dense = [x.contiguous() for x in inputs]
    for causal in (False, True):
        torch.testing.assert_close(
            outputs(*inputs, causal=causal), outputs(*dense, causal=causal), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("dim", [1, 72, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_b19_any_width_and_precision_and_a_scale_of_zero(dim, dtype):
    query, key, value = qkv(HeadMap.mha(1), lengths=(64, 64), dims=(dim, dim), dtype=dtype)
    plan = ea.hyper_plan(query, key, config=PAPER)
    out = ea.hyper_attention(query, key, value, plan=plan, scale=0.0)
    doubles = (x.double() for x in (query, key, value))
    expected, _ = reference.hyper_attention(*doubles, plan, scale=0.0)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_b20_gradients_are_the_same_bits_every_time(causal):
    inputs = qkv(HeadMap.gqa(4, 2), lengths=(700, 700), requires_grad=True)
    # Few keys, drawn with replacement: the same key occurs many times.
    config = HyperConfig.paper(block_size=16, sample_size=256, exact_below=64)
    runs = []
    for _ in range(5):
        out, lse = outputs(*inputs, causal=causal, config=config)
        runs.append(torch.autograd.grad(out.sum() + lse.sum(), inputs))
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


def test_the_default_structure_repeats_its_bits_too():
    inputs = qkv(HeadMap.gqa(4, 2), lengths=(700, 700), requires_grad=True)
    config = HyperConfig(block_size=16, sample_size=32, leaf_size=16, window=16, exact_below=64)
    runs = []
    for _ in range(5):
        out, lse = outputs(*inputs, causal=True, config=config)
        runs.append(torch.autograd.grad(out.sum() + lse.sum(), inputs))
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_b17_the_call_compiles_to_one_graph(causal):
    inputs = qkv(HeadMap.gqa(4, 2), lengths=(96, 96))
    config = HyperConfig(exact_below=64, leaf_size=16, window=16) if causal else PAPER
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(*inputs, causal=causal, config=config),
        outputs(*inputs, causal=causal, config=config),
    )
