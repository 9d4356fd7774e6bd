"""The operators as citizens of the dispatcher: opcheck, compile, autocast, fakes, FLOPs."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import efficient_attn as ea
from efficient_attn import HeadMap, UnsupportedError

ops = torch.ops.efficient_attn


def tensors(*shapes, requires_grad=True):
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


INDEX = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
DENSE = ((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 6))
PACKED = ((6, 4, 8), (6, 2, 8), (6, 2, 6))
STARTS = torch.tensor([0, 2, 6], dtype=torch.int32)
BIAS_SHAPE = (1, 4, 1, 5)


def options(kind):
    """q_to_k, q_to_v, bias, key_lengths, window_left, window_right, scale, softcap."""
    if kind == "plain":
        return (None, None, None, None, None, 0, 0.3, 0.0)
    bias = torch.randn(BIAS_SHAPE, requires_grad=True)
    return (INDEX, INDEX, bias, torch.tensor([3, 5]), 2, None, 0.3, 2.0)


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_opcheck_dense(kind):
    opcheck(ops.attention.default, (*tensors(*DENSE), *options(kind)))


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_opcheck_dense_backward(kind):
    inputs = tensors(*DENSE, requires_grad=False)
    chosen = [x.detach() if isinstance(x, torch.Tensor) else x for x in options(kind)]
    out, lse = ops.attention(*inputs, *chosen)
    grads = (torch.randn_like(out), None if kind == "plain" else torch.randn_like(lse))
    opcheck(ops.attention_backward.default, (*grads, *inputs, out, lse, *chosen, kind != "plain"))


def test_opcheck_packed():
    inputs = tensors(*PACKED)
    packing = (STARTS, STARTS, 4, 4, None, None, None, 0, 0.3, 0.0)
    opcheck(ops.attention_varlen.default, (*inputs, *packing))
    inputs = [x.detach() for x in inputs]
    out, lse = ops.attention_varlen(*inputs, *packing)
    opcheck(
        ops.attention_varlen_backward.default,
        (torch.randn_like(out), None, *inputs, out, lse, *packing),
    )


def test_opcheck_merge():
    opcheck(ops.merge_states.default, (tensors(*[(2, 3, 5)] * 2), tensors(*[(2, 3)] * 2)))


CACHE = ((2, 4, 3, 8), (5, 2, 4, 8), (5, 2, 4, 6))
PAGES = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
LATENT = ((2, 4, 3, 8), (2, 4, 3, 2), (2, 7, 10))


@pytest.mark.parametrize("tokens", [1, 3])
def test_opcheck_cache(tokens):
    query, *caches = tensors(*CACHE, requires_grad=False)
    options = (torch.tensor([3, 7]), PAGES, INDEX, None, 2, 0.3, 2.0)
    opcheck(ops.attention_decode.default, (query[:, :, :tokens], *caches, *options))
    options = (torch.tensor([3, 7]), None, 0.3)
    opcheck(ops.mla_decode.default, (*tensors(*LATENT, requires_grad=False), *options))


def test_attention_to_a_cache_compiles_whole():
    def call(query, key, value, lengths, pages):
        return ea.attention_decode(query, key, value, cache_lengths=lengths, block_table=pages)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = tensors(*CACHE, requires_grad=False)
    for lengths in ([3, 7], [8, 0]):
        arguments = (*inputs, torch.tensor(lengths), PAGES)
        torch.testing.assert_close(compiled(*arguments), call(*arguments))


def test_compiles_whole_with_dynamic_sizes():
    def call(query, key, value, index):
        head_map = HeadMap.from_index(index, num_k_heads=2)
        return ea.attention(query, key, value, head_map=head_map, causal=True, return_lse=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9, 12):
        inputs = tensors((2, 4, tokens, 8), (2, 2, tokens, 8), (2, 2, tokens, 6))
        results = []
        for run in (call, compiled):
            out, lse = run(*inputs, INDEX)
            grads = torch.autograd.grad(out.sum() + lse.sum(), inputs)
            results.append((out, lse, *grads))
        torch.testing.assert_close(*results)


def test_compiles_with_inductor():
    def call(query, key, value):
        return ea.attention(query * 2, key, value, causal=True).relu()

    inputs = tensors(*DENSE)
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    expected = call(*inputs)
    torch.testing.assert_close(compiled(*inputs), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs).sum(), inputs),
        torch.autograd.grad(expected.sum(), inputs),
    )


def test_a_hundred_head_maps_compile_once():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(
        lambda q, k, v, head_map: ea.attention(q, k, v, head_map=head_map),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    inputs = tensors(*DENSE)
    for _ in range(100):
        head_map = HeadMap.from_index(torch.randint(0, 2, (4,)), num_k_heads=2)
        out = compiled(*inputs, head_map)
    torch.testing.assert_close(out, ea.attention(*inputs, head_map=head_map))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_autocast(packed):
    query, key, value = inputs = tensors(*(PACKED if packed else DENSE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if packed:
            ends = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
            out = ea.attention_varlen(
                query, key.bfloat16(), value, **ends, max_seqlen_q=4, max_seqlen_k=4
            )
        else:
            out = ea.attention(query, key.bfloat16(), value)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), inputs))


def test_fake_tensors_know_shapes_and_strides():
    with torch._subclasses.FakeTensorMode():
        inputs = tensors(*DENSE)
        out, lse = ea.attention(*inputs, return_lse=True)
        grads = torch.autograd.grad(out.sum(), inputs)
    real = tensors(*DENSE)
    real_out, real_lse = ea.attention(*real, return_lse=True)
    real_grads = torch.autograd.grad(real_out.sum(), real)
    for a, b in zip((out, lse, *grads), (real_out, real_lse, *real_grads), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_flops_count_what_is_visible():
    query, key, value = tensors(*DENSE)
    with FlopCounterMode(display=False) as counter:
        out = ea.attention(query, key, value, causal=True)
    pairs = 2 * 4 * (5 * 6 // 2)
    assert counter.get_total_flops() == 2 * pairs * (8 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * 8 + 2 * 6)


def test_flops_of_packed_sequences_are_those_of_each_alone():
    ends = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 4, "max_seqlen_k": 4}
    with FlopCounterMode(display=False) as counter:
        ea.attention_varlen(*tensors(*PACKED), **ends)
    assert counter.get_total_flops() == 2 * 4 * (2 * 2 + 4 * 4) * (8 + 6)


def test_flops_of_a_cache_are_those_of_its_lengths():
    with FlopCounterMode(display=False) as counter:
        ea.attention_decode(*tensors(*CACHE), cache_lengths=torch.tensor([3, 7]), block_table=PAGES)
        ea.mla_decode(*tensors(*LATENT), cache_lengths=torch.tensor([3, 7]), scale=1.0)
    pairs = 4 * (1 + 2 + 3 + 5 + 6 + 7)
    assert counter.get_total_flops() == 2 * pairs * (8 + 6) + 2 * pairs * (10 + 8)


def test_second_derivatives_are_refused_by_name():
    query, key, value = tensors(*DENSE)
    (grad,) = torch.autograd.grad(ea.attention(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        grad.sum().backward()
