"""`attention` against the reference: every option, every head map, every storage order."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import efficient_attn as ea
from efficient_attn import HeadMap, reference
from efficient_attn.testing import assert_accurate, head_maps, qkv

MAPS = head_maps()


def gradients(outputs, inputs, grad_outputs):
    """Gradients with -inf in the lse left out, and zeros where an input plays no part."""
    pairs = [
        (x.masked_fill(x == -torch.inf, 0.0), g)
        for x, g in zip(outputs, grad_outputs, strict=True)
        if g is not None
    ]
    return torch.autograd.grad(
        [x for x, _ in pairs], inputs, [g for _, g in pairs], materialize_grads=True
    )


def check(inputs, options, *, through_lse=False):
    """Compare outputs and gradients of every floating input with the reference's, in fp64."""
    leaves = [*inputs]
    if options.get("bias") is not None and options["bias"].requires_grad:
        leaves.append(options["bias"])
    actual = ea.attention(*inputs, **options, return_lse=True)
    expected = reference.attention(*inputs, **options)
    torch.testing.assert_close(actual, expected)
    grad_out = torch.randn_like(expected[0])
    grad_lse = torch.randn_like(expected[1]) if through_lse else None
    torch.testing.assert_close(
        gradients(actual, leaves, (grad_out, grad_lse)),
        gradients(expected, leaves, (grad_out, grad_lse)),
    )


@pytest.mark.parametrize("through_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", MAPS)
def test_every_head_map(name, causal, through_lse):
    inputs = qkv(MAPS[name], lengths=(5, 7), dtype=torch.float64, requires_grad=True)
    check(inputs, {"head_map": MAPS[name], "causal": causal}, through_lse=through_lse)


@st.composite
def calls(draw):
    """A call with any mix of options, on awkward sizes."""
    batch = draw(st.integers(1, 3))
    nq, nk = draw(st.sampled_from([1, 2, 5, 17])), draw(st.sampled_from([1, 3, 5, 19]))
    dim = draw(st.sampled_from([1, 7, 8]))
    value_dim = draw(st.sampled_from([dim, 5, 12]))
    maps = head_maps(batch)
    head_map = maps[draw(st.sampled_from(sorted(maps)))]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    limit = st.sampled_from([None, 0, 1, 3, 30])
    options = {
        "head_map": head_map,
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(limit, limit)),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
        "scale": draw(st.sampled_from([None, 0.7])),
    }
    if draw(st.booleans()):
        options["key_lengths"] = torch.randint(0, nk + 1, (batch,))
    shape = draw(
        st.sampled_from(
            [None, (batch, 6, nq, nk), (1, 1, 1, nk), (6, nq, 1), (batch, 1, 1, nk), (nk,), ()]
        )
    )
    if shape is not None:
        bias = torch.randn(shape, dtype=torch.float64)
        if draw(st.booleans()):
            bias = bias.masked_fill(torch.rand_like(bias) < 0.4, -torch.inf)
        options["bias"] = bias.requires_grad_(draw(st.booleans()))
    layout = draw(st.sampled_from(["tokens", "heads", "strided", "broadcast"]))
    inputs = qkv(head_map, batch, (nq, nk), (dim, value_dim), dtype=torch.float64, layout=layout)
    return [x.requires_grad_() for x in inputs], options, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(calls())
def test_any_mix_of_options(call):
    inputs, options, through_lse = call
    check(inputs, options, through_lse=through_lse)


def test_a_bias_in_fp32_beside_inputs_in_fp64():
    inputs = qkv(HeadMap.mha(2), lengths=(16, 16), dtype=torch.float64, requires_grad=True)
    check(inputs, {"bias": torch.randn(1, 1, 1, 16)})


@pytest.mark.parametrize("layout", ["tokens", "heads", "strided", "broadcast"])
def test_any_strides_of_every_tensor(layout):
    inputs = qkv(MAPS["gqa"], lengths=(5, 5), dtype=torch.float64, layout=layout)
    bias = torch.randn(5, 6, 2, 5, dtype=torch.float64).permute(2, 1, 3, 0)
    inputs = [x.requires_grad_() for x in inputs]
    check(inputs, {"bias": bias, "causal": True})
    # The gradient of a sum is one number broadcast over all strides.
    grads = [
        torch.autograd.grad(out.sum(), inputs)
        for out in (ea.attention(*inputs), reference.attention(*inputs)[0])
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gqa", "uneven", "more value heads", "one row per sample"])
def test_accuracy_in_low_precision(name, dtype):
    head_map = MAPS[name]
    inputs = qkv(head_map, lengths=(65, 130), dims=(32, 24), dtype=dtype, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad_out = torch.randn(2, 6, 65, 24, dtype=dtype)
    options = {"head_map": head_map, "causal": True}

    results = []
    for call, tensors in (
        (ea.attention, inputs),
        (reference.attention, exact),
        (reference.attention, inputs),
    ):
        more = {"return_lse": True} if call is ea.attention else {}
        out, lse = call(*tensors, **options, **more)
        results.append((out, lse, *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))))
    for actual, truth, plain in zip(*results, strict=True):
        assert_accurate(actual, truth, plain, floor=1e-6 if dtype == torch.float32 else 1e-3)
    assert results[0][0].dtype == dtype and results[0][1].dtype == torch.float32


@pytest.mark.parametrize("window", [(64, 0), (100, 30), (None, 3), (7, None)], ids=str)
def test_windows_longer_than_a_block_of_rows(window):
    inputs = qkv(MAPS["uneven"], 1, (300, 333), (8, 8), dtype=torch.float64, requires_grad=True)
    check(inputs, {"head_map": MAPS["uneven"], "window": window})


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["flash", "blocked"])
def test_what_lies_behind_key_lengths_is_never_read(options, poisoned_memory):
    head_map = MAPS["permuted"]
    query, key, value = qkv(head_map, lengths=(4, 9), dtype=torch.float64)
    lengths = torch.tensor([6, 0])
    expected = ea.attention(
        query, key, value, head_map=head_map, key_lengths=lengths, causal=True, **options
    )
    poisoned = [x.clone() for x in (key, value)]
    for x in poisoned:
        x[0, :, 6:] = torch.nan
        x[1] = torch.inf
        x.requires_grad_()
    out = ea.attention(
        query, *poisoned, head_map=head_map, key_lengths=lengths, causal=True, **options
    )
    assert torch.equal(out, expected)
    for x, grad in zip(poisoned, torch.autograd.grad(out.sum(), poisoned), strict=True):
        assert grad[0, :, :6].isfinite().all()
        assert (grad[x.detach().isfinite().logical_not()] == 0).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["flash", "blocked"])
@pytest.mark.parametrize("name", MAPS)
def test_every_element_is_written(name, options, poisoned_memory):
    head_map = MAPS[name]
    inputs = qkv(head_map, lengths=(9, 4), dtype=torch.float64, requires_grad=True)
    out, lse = ea.attention(
        *inputs, head_map=head_map, causal=True, window=(1, 0), return_lse=True, **options
    )
    assert not out.isnan().any() and not lse.isnan().any()
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert not grad.isnan().any()


@pytest.mark.parametrize("name", ["gqa", "uneven", "keys apart from values"])
def test_the_same_bits_every_time(name):
    inputs = qkv(MAPS[name], lengths=(70, 70), requires_grad=True)

    def run():
        out, lse = ea.attention(*inputs, head_map=MAPS[name], causal=True, return_lse=True)
        return out, lse, *torch.autograd.grad(out.square().sum(), inputs)

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_permuting_query_heads_and_their_map_permutes_the_result():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    head_map = MAPS["keys apart from values"]
    query, key, value = qkv(head_map, dtype=torch.float64)
    out = ea.attention(query, key, value, head_map=head_map)
    permuted = HeadMap.from_index(
        head_map.q_to_k[order], head_map.q_to_v[order], num_k_heads=4, num_v_heads=2
    )
    torch.testing.assert_close(
        ea.attention(query[:, order], key, value, head_map=permuted), out[:, order]
    )


def test_permuting_key_heads_and_relabelling_them_changes_nothing():
    order, inverse = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])
    index = torch.tensor([0, 0, 1, 3, 3, 3])
    query, key, value = qkv(MAPS["uneven"], dtype=torch.float64)
    key, value = (torch.randn(2, 4, *x.shape[2:], dtype=x.dtype) for x in (key, value))
    maps = (HeadMap.from_index(i, num_k_heads=4) for i in (index, inverse[index]))
    before, after = (
        ea.attention(query, k, v, head_map=head_map)
        for (k, v), head_map in zip(
            ((key, value), (key[:, order], value[:, order])), maps, strict=True
        )
    )
    torch.testing.assert_close(before, after)


def test_a_shared_head_has_the_sum_of_the_gradients_of_its_copies():
    head_map = MAPS["uneven"]
    inputs = qkv(head_map, lengths=(5, 9), dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*inputs[0].shape[:3], inputs[2].shape[-1], dtype=torch.float64)
    shared = torch.autograd.grad(ea.attention(*inputs, head_map=head_map), inputs, grad)
    index = head_map.key_index().long()
    copies = [inputs[0], *(x.detach()[:, index].requires_grad_() for x in inputs[1:])]
    own = torch.autograd.grad(ea.attention(*copies), copies, grad)
    torch.testing.assert_close(shared[0], own[0])
    for ours, each in zip(shared[1:], own[1:], strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours).index_add(1, index, each))


def test_attention_over_parts_of_the_keys_merges_into_the_whole():
    inputs = qkv(MAPS["gqa"], lengths=(5, 11), dtype=torch.float64, requires_grad=True)
    query, key, value = inputs
    parts = [
        ea.attention(query, key[:, :, a:b], value[:, :, a:b], return_lse=True)
        for a, b in ((0, 4), (4, 4), (4, 11))
    ]
    merged = ea.merge_states(*zip(*parts, strict=True))
    whole = ea.attention(*inputs, return_lse=True)
    torch.testing.assert_close(merged, whole)
    grad_outputs = [torch.randn_like(x) for x in whole]
    torch.testing.assert_close(
        gradients(merged, inputs, grad_outputs), gradients(whole, inputs, grad_outputs)
    )


@pytest.mark.parametrize(
    ("batch", "nq", "nk"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)], ids=str
)
def test_nothing_to_do(batch, nq, nk):
    inputs = qkv(MAPS["uneven"], batch, (nq, nk), requires_grad=True)
    bias = torch.zeros(1, 1, 1, nk, requires_grad=True)
    out, lse = ea.attention(*inputs, head_map=MAPS["uneven"], bias=bias, return_lse=True)
    assert out.shape == (batch, 6, nq, 16) and (out == 0).all() and (lse == -torch.inf).all()
    for x, grad in zip(
        (*inputs, bias), torch.autograd.grad(out.sum(), (*inputs, bias)), strict=True
    ):
        assert grad.shape == x.shape and (grad == 0).all()


@pytest.mark.parametrize("dims", [*itertools.product((1, 7, 300), (1, 7, 300))], ids=str)
def test_unusual_head_dims(dims):
    inputs = qkv(MAPS["mqa"], 1, (3, 4), dims, dtype=torch.float64, requires_grad=True)
    check(inputs, {"causal": True})


def test_merging_the_heads_of_the_result_is_a_view():
    for layout in ("tokens", "heads"):
        out = ea.attention(*qkv(MAPS["gqa"], layout=layout))
        assert out.transpose(1, 2).is_contiguous()


def test_inputs_are_left_alone():
    inputs = qkv(MAPS["uneven"], requires_grad=True)
    bias = torch.randn(6, 16, 16)
    before = [x.detach().clone() for x in (*inputs, bias)]
    ea.attention(
        *inputs, head_map=MAPS["uneven"], bias=bias, softcap=3.0, causal=True
    ).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, bias), strict=True))
