"""HyperAttention in Triton against its reference: one plan, every structure, awkward shapes."""

from dataclasses import replace

import pytest
import torch

from efficient_attn import HeadMap, HyperConfig, reference
from efficient_attn.kernels.triton import hyper
from efficient_attn.kernels.triton._arguments import Problem
from efficient_attn.planning import make_plan
from efficient_attn.testing import assert_accurate, qkv
from tests.kernels.triton.oracle import DEVICE, NAMES

PAIR = HeadMap.gqa(2, 1)
# Blocks, samples and leaves are longer than the tiles of the interpreter, or not a multiple.
LEAVES = HyperConfig(
    block_size=24, sample_size=20, leaf_size=40, window=8, sinks=3, exact_below=2, num_projections=2
)
PAPER = HyperConfig.paper(block_size=24, sample_size=20, exact_below=20, num_projections=2)
CONFIGS = {
    "leaves": LEAVES,
    "small leaves by rank, with replacement": HyperConfig(
        block_size=9, sample_size=7, leaf_size=24, window=3, exact_below=2, align_blocks=False,
        own_samples=False, replacement=True, center=False,
    ),
    "window and sinks": HyperConfig(
        block_size=0, sample_size=0, leaf_size=32, window=20, sinks=18, exact_below=2
    ),
    "paper": PAPER,
    "samples only": HyperConfig.paper(block_size=0, sample_size=20, exact_below=20),
    "blocks only": HyperConfig.paper(block_size=24, sample_size=0, exact_below=20),
}  # fmt: skip
SCALE = 0.7


def call(config, causal, *, head_map=PAIR, lengths=(70, 90), **shape):
    """Inputs and their plan."""
    tensors = qkv(head_map, **({"batch": 1, "lengths": lengths, "device": DEVICE} | shape))
    return tensors, make_plan(*tensors[:2], causal=causal, config=config, seed=1)


def results(tensors, plan, weights=None, scale=SCALE):
    """Everything that the kernels compute."""
    out, lse = hyper.forward(*tensors, *plan, scale)
    grad_out, grad_lse = weights or (out, torch.zeros_like(lse))
    return [out, lse, *hyper.backward(grad_out, grad_lse, *tensors, out, lse, *plan, scale)]


def compare(tensors, plan, floor=2e-6):
    """Assert that the kernels are as near to the truth as the plain formula in the same dtype."""
    batch, heads, nq, _ = tensors[0].shape
    weights = (
        torch.randn(batch, heads, nq, tensors[2].shape[-1], device=DEVICE, dtype=tensors[0].dtype),
        torch.randn(batch, heads, nq, device=DEVICE),
    )
    references = []
    for dtype in (torch.float64, tensors[0].dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out, lse = reference.hyper_attention(*leaves, plan, scale=SCALE)
        sent = [w.to(x.dtype) for w, x in zip(weights, (out, lse), strict=True)]
        references.append([out, lse, *torch.autograd.grad((out, lse), leaves, sent)])
    found = results(tensors, plan, weights)
    for name, result, truth, plain in zip(NAMES, found, *references, strict=False):
        assert result.shape == truth.shape, name
        try:
            assert_accurate(result, truth, plain, floor=floor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_the_reference(name, causal):
    lengths = (50, 70) if causal else (60, 45)
    tensors, plan = call(CONFIGS[name], causal, lengths=lengths, dims=(16, 12))
    assert not plan.is_exact
    compare(tensors, plan)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("part", ["exact_part", "sampled_part"])
@pytest.mark.usefixtures("poisoned_memory")
def test_parts_of_a_plan(part, causal):
    tensors, plan = call(LEAVES, causal, lengths=(70, 90), dims=(16, 12))
    compare(tensors, getattr(plan, part)())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("config", "causal"), [(LEAVES, True), (PAPER, False)])
def test_half_precision(config, causal, dtype):
    tensors, plan = call(config, causal, lengths=(48, 60), dims=(40, 24), dtype=dtype)
    compare(tensors, plan, floor=4e-3)


@pytest.mark.parametrize(("config", "causal"), [(LEAVES, False), (PAPER, True)])
def test_wide_heads_take_their_gradients_one_by_one(config, causal):
    tensors, plan = call(config, causal, lengths=(40, 50), dims=(256, 128))
    compare(tensors, plan)


@pytest.mark.parametrize(
    ("lengths", "causal"), [((1, 50), True), ((35, 1), False), ((40, 20), True), ((40, 20), False)]
)
@pytest.mark.usefixtures("poisoned_memory")
def test_short_and_unequal_lengths(lengths, causal):
    small = replace(LEAVES, leaf_size=16, block_size=8, sample_size=4)
    found = compare(*call(small, causal, lengths=lengths))
    if causal and lengths[0] > lengths[1]:
        blind = lengths[0] - lengths[1]
        assert (found[1][:, :, :blind] == -torch.inf).all()
        assert not found[0][:, :, :blind].any() and not found[2][:, :, :blind].any()


@pytest.mark.parametrize(
    ("head_map", "batch"),
    [(HeadMap.gqa(5, 5), 1), (HeadMap.gqa(4, 2), 2)],
    ids=["heads", "samples"],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_deep_recursions_are_computed_in_parts(head_map, batch):
    deep = replace(PAPER, exact_below=4, block_size=8, sample_size=4)
    tensors, plan = call(deep, True, head_map=head_map, batch=batch, lengths=(22, 25))
    problem = hyper.HyperProblem.of(*tensors, *plan, SCALE)
    assert problem.num_levels == 3
    assert len(list(problem.parts())) == (2 if batch == 2 else 3)
    compare(tensors, plan)


def test_the_number_of_launches_does_not_depend_on_the_depth(monkeypatch):
    launches = []
    monkeypatch.setattr(Problem, "launch", lambda self, kernel, *_, **__: launches.append(kernel))
    counts = []
    for exact_below in (4, 16, 64):
        config = replace(PAPER, exact_below=exact_below)
        tensors, plan = call(config, True, lengths=(512, 512), head_map=HeadMap.gqa(8, 4))
        assert plan.key_order.shape[2] == {4: 7, 16: 5, 64: 3}[exact_below]
        launches.clear()
        results(tensors, plan)
        counts.append(len(launches))
    assert counts == [counts[0]] * 3


def test_a_workspace_is_no_larger_than_the_output():
    def meta(heads, tokens):
        return torch.empty(1, heads, tokens, 128, dtype=torch.bfloat16, device="meta")

    for levels in range(1, 9):
        tensors, plan = call(replace(PAPER, exact_below=2), True, lengths=(1 << levels + 1,) * 2)
        assert plan.key_order.shape[2] == levels
        plan = plan._replace(
            **{name: getattr(plan, name).to("meta") for name in plan._fields[:9]},
            leaf_size=2**17 >> levels,
        )
        plan = plan._replace(key_order=torch.empty(1, 32, levels, 2**17, device="meta"))
        tensors = [meta(32, 2**17) for _ in range(3)]
        problem = hyper.HyperProblem.of(*tensors, *plan, SCALE)
        for *_, part in problem.parts():
            assert part.workspace(128)[0].numel() <= tensors[0].numel()


@pytest.mark.parametrize("causal", [False, True])
def test_an_exact_plan(causal):
    tensors, plan = call(HyperConfig(), causal, lengths=(20, 30))
    assert plan.is_exact
    compare(tensors, plan)


@pytest.mark.parametrize("layout", ["tokens", "strided"])
def test_any_strides(layout):
    compare(*call(LEAVES, True, lengths=(45, 50), layout=layout))


@pytest.mark.parametrize(("config", "causal"), [(LEAVES, False), (PAPER, True)])
def test_results_are_repeatable_and_those_of_each_sample_alone(config, causal):
    tensors, plan = call(config, causal, batch=2, lengths=(30, 45), head_map=HeadMap.mha(1))
    together, again = results(tensors, plan), results(tensors, plan)
    alone = [x[1:] for x in tensors]
    plan = make_plan(*alone[:2], causal=causal, config=config, seed=1)
    for a, b, c in zip(together, again, results(alone, plan), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a[1:], c, rtol=0, atol=0)


def test_results_are_stored_tokens_major():
    for x in results(*call(PAPER, True, lengths=(20, 45))):
        assert x.dim() == 3 or x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("causal", [False, True])
def test_extreme_scores_are_finite(causal):
    for config in (LEAVES, PAPER):
        (query, key, value), plan = call(config, causal)
        key = (
            torch.ones_like(key)
            * torch.where(torch.arange(90, device=DEVICE) == 0, 1e4, 1.0)[:, None]
        )
        for x in results((query * 1e2, key, value), plan):
            assert x.isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="only the CPU hands out memory that is never touched")
def test_offsets_beyond_32_bits():
    # Ten rows, one every 2**28 elements: the last begins 2**31 elements behind the first.
    storage = torch.empty(10 * 2**28, dtype=torch.float16, device=DEVICE)
    wide = storage.as_strided((1, 1, 10, 16), (0, 0, 2**28, 1))
    wide.copy_(torch.randn(1, 1, 10, 16))
    config = replace(LEAVES, leaf_size=2, window=1, block_size=2, sample_size=2, sinks=1)
    plan = make_plan(wide, wide, causal=True, config=config, seed=0)
    apart = results((wide,) * 3, plan)
    for a, b in zip(apart, results((wide.contiguous(),) * 3, plan), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_tiles_come_in_the_order_of_their_keys(name, causal):
    # Gradients of keys look for the tiles that meet them by bisection.
    for lengths in ((70, 90), (90, 70), (3, 200), (200, 200)):
        _, plan = call(CONFIGS[name], causal, lengths=lengths)
        first = plan.block_first.masked_fill(plan.block_rows[..., :1].lt(0).all(-1), 2**30)
        filled = first < 2**30
        ordered = first.masked_fill(~filled, 0).cummax(-1).values
        assert (ordered == first)[filled].all()
        assert (plan.block_sample.diff() >= 0).all()
