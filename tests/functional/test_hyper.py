"""The public HyperAttention against its reference, in fp64 and below, on awkward input."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import efficient_attn as ea
from efficient_attn import HeadMap, HyperConfig, reference
from efficient_attn.testing import assert_accurate, head_maps, qkv

PAPER = HyperConfig.paper(block_size=8, sample_size=8, exact_below=16, num_projections=3)
LEAVES = HyperConfig(
    block_size=8, sample_size=8, leaf_size=8, window=8, sinks=2, exact_below=16, num_projections=3
)
CONFIGS = {
    "paper": PAPER,
    "paper without blocks": HyperConfig.paper(block_size=0, sample_size=8, exact_below=16),
    "leaves": LEAVES,
    "leaves without blocks": HyperConfig(
        block_size=0, sample_size=8, leaf_size=8, window=0, sinks=0, exact_below=2,
        max_sample_mass=None,
    ),
    "leaves by rank, with replacement": HyperConfig(
        block_size=9, sample_size=7, leaf_size=4, window=3, exact_below=16, align_blocks=False,
        own_samples=False, replacement=True, center=False, max_sample_mass=1.5,
    ),
    "window and sinks": HyperConfig(
        block_size=0, sample_size=0, leaf_size=8, window=8, sinks=3, exact_below=2
    ),
}  # fmt: skip
LENGTHS = [(64, 64), (61, 61), (37, 100), (60, 41), (1, 80), (5, 5)]


def both(config, causal, query, key, value, scale=0.7):
    """The op and the reference, with one plan."""
    plan = ea.hyper_plan(query, key, causal=causal, config=config, seed=1)
    actual = ea.hyper_attention(
        query, key, value, causal=causal, scale=scale, config=config, plan=plan, return_lse=True
    )
    return actual, of_reference(query, key, value, plan, config, scale=scale)


def of_reference(query, key, value, plan, config, **options):
    options["max_sample_mass"] = config.max_sample_mass
    return reference.hyper_attention(query, key, value, plan, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_the_reference_with_gradients(name, causal):
    for lengths in LENGTHS:
        group, layout = (1, "heads") if lengths[0] % 2 else (2, "tokens")
        inputs = qkv(
            HeadMap.gqa(2 * group, 2), lengths=lengths, dims=(8, 5), dtype=torch.float64,
            layout=layout, requires_grad=True,
        )  # fmt: skip
        actual, expected = both(CONFIGS[name], causal, *inputs)
        torch.testing.assert_close(actual, expected)
        finite = expected[1].isfinite()
        weights = [torch.randn_like(x) for x in expected]
        for with_lse in (False, True):
            grads = [
                torch.autograd.grad(
                    (out * weights[0]).sum() + with_lse * (lse * weights[1])[finite].sum(),
                    inputs,
                    retain_graph=True,
                )
                for out, lse in (actual, expected)
            ]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [PAPER, LEAVES], ids=["paper", "leaves"])
def test_accurate_in_every_precision(config, dtype, causal):
    for dim in (32, 40, 136):
        query, key, value = qkv(HeadMap.gqa(4, 2), lengths=(90, 90), dims=(dim, 16), dtype=dtype)
        plan = ea.hyper_plan(query, key, causal=causal, config=config)
        actual = ea.hyper_attention(
            query, key, value, causal=causal, config=config, plan=plan, return_lse=True
        )
        truth = of_reference(query.double(), key.double(), value.double(), plan, config)
        plain = of_reference(query, key, value, plan, config)
        assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
        assert_accurate(actual[0], truth[0], plain[0], floor=1e-5 if dtype.itemsize == 4 else 4e-3)
        torch.testing.assert_close(actual[1].double(), truth[1], atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", head_maps())
def test_every_head_map(name):
    head_map = head_maps()[name]
    query, key, value = qkv(head_map, lengths=(64, 64), dtype=torch.float64)
    config = HyperConfig(
        block_size=0, sample_size=64, leaf_size=8, window=8, exact_below=2, max_sample_mass=None
    )
    out = ea.hyper_attention(query, key, value, causal=True, config=config, head_map=head_map)
    # Everything is sampled once, so the result is exact.
    expected, _ = reference.attention(query, key, value, causal=True, head_map=head_map)
    torch.testing.assert_close(out, expected)
    plan = ea.hyper_plan(query, key, causal=True, config=LEAVES, head_map=head_map)
    again = ea.hyper_attention(query, key, value, causal=True, plan=plan, head_map=head_map)
    out = ea.hyper_attention(query, key, value, causal=True, config=LEAVES, head_map=head_map)
    torch.testing.assert_close(out, again, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths_and_packing_equal_calls_on_their_own(causal):
    query, key, value = qkv(HeadMap.gqa(4, 2), batch=3, lengths=(50, 70), dtype=torch.float64)
    lengths = torch.tensor([70, 40, 0])
    options = {"causal": causal, "config": LEAVES, "seed": 2, "return_lse": True}
    out, lse = ea.hyper_attention(query, key, value, key_lengths=lengths, **options)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    cut = torch.cat([torch.arange(length) + 70 * b for b, length in enumerate(lengths.tolist())])
    packed_out, packed_lse = ea.hyper_attention_varlen(
        packed[0], packed[1][cut], packed[2][cut],
        cu_seqlens_q=torch.tensor([0, 50, 100, 150]), cu_seqlens_k=torch.tensor([0, 70, 110, 110]),
        **options,
    )  # fmt: skip
    for b, length in enumerate(lengths.tolist()):
        alone = ea.hyper_attention(
            query[b : b + 1], key[b : b + 1, :, :length], value[b : b + 1, :, :length], **options
        )
        torch.testing.assert_close((out[b], lse[b]), (alone[0][0], alone[1][0]))
        rows = slice(50 * b, 50 * b + 50)
        torch.testing.assert_close(packed_out[rows].transpose(0, 1), alone[0][0])
        torch.testing.assert_close(packed_lse[rows].transpose(0, 1), alone[1][0])


def test_below_the_limit_the_result_is_that_of_exact_attention():
    query, key, value = qkv(HeadMap.gqa(4, 2), lengths=(15, 15))
    for config in (PAPER, LEAVES):
        for causal in (False, True):
            out = ea.hyper_attention(query, key, value, causal=causal, config=config)
            assert torch.equal(out, ea.attention(query, key, value, causal=causal))


@pytest.mark.parametrize("name", ["leaves", "leaves without blocks", "window and sinks"])
def test_later_tokens_change_nothing(name):
    inputs = qkv(HeadMap.gqa(4, 2), lengths=(96, 96), dtype=torch.float64)
    options = {"causal": True, "config": CONFIGS[name], "return_lse": True}
    before = ea.hyper_attention(*inputs, **options)
    for t in (17, 50, 95):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, :, t:] = 5 * torch.randn_like(x[:, :, t:]) + 3
        after = ea.hyper_attention(*changed, **options)
        torch.testing.assert_close(
            [x[:, :, :t] for x in after], [x[:, :, :t] for x in before], rtol=1e-12, atol=1e-12
        )
        assert not torch.equal(after[0][:, :, t:], before[0][:, :, t:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_ones_average_to_one(name, causal):
    for lengths in LENGTHS:
        query, key, value = qkv(HeadMap.mha(2), lengths=lengths)
        out, lse = ea.hyper_attention(
            query, key, torch.ones_like(value), causal=causal, config=CONFIGS[name], return_lse=True
        )
        torch.testing.assert_close(out, lse.isfinite().unsqueeze(-1).expand_as(out).float())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("config", [PAPER, LEAVES], ids=["paper", "leaves"])
def test_extreme_input_gives_finite_results_and_gradients(config, causal):
    query, key, value = qkv(HeadMap.mha(2), lengths=(90, 90))
    huge_sink = key.clone()
    huge_sink[:, :, 0] = 1e4
    cases = [
        (query, torch.zeros_like(key)),
        (query, torch.ones_like(key)),
        (100 * query, 100 * key),
        (query, huge_sink),
    ]
    for q, k in cases:
        inputs = [x.clone().requires_grad_() for x in (q, k, value)]
        out, lse = ea.hyper_attention(*inputs, causal=causal, config=config, return_lse=True)
        grads = torch.autograd.grad(out.sum() + lse.sum(), inputs)
        assert all(x.isfinite().all() for x in (out, lse, *grads))


@pytest.mark.parametrize("config", [PAPER, LEAVES], ids=["paper", "leaves"])
def test_nan_and_infinity_reach_the_rows_that_see_them(config):
    for bad in (math.nan, math.inf):
        query, key, value = qkv(HeadMap.mha(1), batch=1, lengths=(96, 96))
        key[:, :, 40] = value[:, :, 40] = bad
        out = ea.hyper_attention(query, key, value, causal=True, config=config)
        assert not out[:, :, 40].isfinite().any()


def test_a_plan_is_a_constant_of_the_gradient():
    inputs = [
        x.requires_grad_() for x in qkv(HeadMap.mha(1), 1, (24, 24), (3, 2), dtype=torch.float64)
    ]
    plan = ea.hyper_plan(*inputs[:2], causal=True, config=LEAVES)
    assert not plan.is_exact
    assert torch.autograd.gradcheck(
        lambda *x: ea.hyper_attention(*x, causal=True, plan=plan, return_lse=True),
        inputs,
        fast_mode=True,
    )


@pytest.mark.parametrize("config", [PAPER, LEAVES], ids=["paper", "leaves"])
def test_opcheck(config):
    inputs = qkv(HeadMap.gqa(4, 2), lengths=(40, 40), requires_grad=True)
    plan = ea.hyper_plan(*inputs[:2], causal=True, config=config)
    torch.library.opcheck(torch.ops.efficient_attn.hyper_attention, (*inputs, *plan, 0.5))


def test_flops_follow_the_plan():
    query, key, value = qkv(HeadMap.mha(1), batch=1, lengths=(256, 256), requires_grad=True)
    config = HyperConfig.paper(block_size=16, sample_size=8, exact_below=64)
    plan = ea.hyper_plan(query, key, causal=True, config=config)
    with FlopCounterMode(display=False) as counter:
        out = ea.hyper_attention(query, key, value, causal=True, plan=plan)
        forward = counter.get_total_flops()
        out.sum().backward()
    leaves = 4 * 64 * 65 // 2
    far = (16 + 8) * (128 + 128)
    per_score = 4 * 16
    assert forward == per_score * (leaves + far)
    assert counter.get_total_flops() == 3.5 * forward


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"config": {"block_size": 3}}, TypeError, "config is a dict"),
        ({"seed": 1.0}, TypeError, "seed is 1.0"),
        ({"plan": (1, 2)}, TypeError, "plan is a tuple"),
        ({"causal": False}, ValueError, "made for causal=True"),
        ({"key_lengths": torch.tensor([5, 6])}, ValueError, "plan and key_lengths"),
        ({"key_lengths": torch.tensor([5, 600])}, ValueError, "must lie in"),
        ({"query": torch.randn(2, 2, 39, 16)}, ValueError, "plan is for 2 samples"),
        ({"value": torch.randn(2, 2, 39, 16)}, ValueError, "every key needs one value"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refused(change, kind, message):
    query, key, value = qkv(HeadMap.mha(2), lengths=(40, 40))
    arguments = {
        "query": query, "key": key, "value": value, "causal": True,
        "plan": ea.hyper_plan(query, key, causal=True, config=LEAVES),
    }  # fmt: skip
    with pytest.raises(kind, match=message):
        ea.hyper_attention(**{**arguments, **change})


@pytest.mark.parametrize("causal", [False, True])
def test_a_sample_weighs_no_more_than_its_limit(causal):
    query, key, value = qkv(HeadMap.mha(2), lengths=(200, 200), dtype=torch.float64)
    # Far keys, which are sampled, point where all queries do; near ones do not.
    query, key = query + 1, torch.cat([key[:, :, :100] + 1, key[:, :, 100:] - 1], dim=2)
    plan = ea.hyper_plan(query, key, causal=causal, config=LEAVES)
    exact_lse = reference.hyper_attention(query, key, value, plan.exact_part())[1]
    free = ea.hyper_attention(
        query, key, value, causal=causal, plan=plan, return_lse=True,
        config=dataclasses.replace(LEAVES, max_sample_mass=None),
    )  # fmt: skip
    for limit in (0.25, 3.0, 1e9):
        out, lse = ea.hyper_attention(
            query, key, value, causal=causal, plan=plan, return_lse=True,
            config=dataclasses.replace(LEAVES, max_sample_mass=limit),
        )  # fmt: skip
        allowed = exact_lse + math.log1p(limit)
        torch.testing.assert_close(lse, torch.minimum(free[1], allowed))
        kept = free[1] <= allowed
        torch.testing.assert_close(out[kept], free[0][kept])
        assert kept.any() and (limit == 1e9 or not kept.all())
