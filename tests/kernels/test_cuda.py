"""The choice on CUDA, with CPU tensors and Triton's interpreter in the place of a device."""

import pytest
import torch

from efficient_attn import HyperConfig, UnsupportedError, reference
from efficient_attn.planning import make_plan
from efficient_attn.testing import head_maps, qkv

pytest.importorskip("triton", reason="what is chosen from has to be importable")
cuda = pytest.importorskip("efficient_attn.kernels.cuda")

OPTIONS = (None, None, None, 0, 0.25, 0.0)  # bias, key_lengths, window, scale, softcap


@pytest.mark.parametrize("name", ["gqa", "uneven"])
def test_triton_answers_what_torch_does_not(name):
    head_map = head_maps()[name]
    inputs = qkv(head_map, 1, (9, 9), requires_grad=True)
    maps = (head_map.q_to_k, head_map.q_to_v)
    with torch.no_grad():
        out, lse = cuda.forward(*inputs, *maps, *OPTIONS)
    expected, expected_lse = reference.attention(*inputs, head_map=head_map, causal=True)
    torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=1e-4, atol=1e-4)
    grad_out = torch.randn_like(out)
    with torch.no_grad():
        *grads, _ = cuda.backward(grad_out, None, *inputs, out, lse, *maps, *OPTIONS, False)
    torch.testing.assert_close(
        tuple(grads), torch.autograd.grad(expected, inputs, grad_out), rtol=1e-4, atol=1e-4
    )


def test_packed_sequences_go_to_triton():
    head_map = head_maps()["gqa"]
    inputs = [x[0].transpose(0, 1) for x in qkv(head_map, 1, (9, 9))]
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, lse = cuda.forward_varlen(*inputs, ends, ends, 5, 5, None, None, None, 0, 0.25, 0.0)
    expected = reference.attention_varlen(
        *inputs, cu_seqlens_q=ends, cu_seqlens_k=ends, head_map=head_map, causal=True
    )
    torch.testing.assert_close((out, lse), expected, rtol=1e-4, atol=1e-4)


def test_a_refusal_names_every_reason():
    inputs = qkv(head_maps()["gqa"], 1, (3, 3), (300, 4), dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="attention on CUDA") as refusal:
        cuda.forward(*inputs, None, None, *OPTIONS)
    assert len(refusal.value.reasons) == 3
    plan = make_plan(*inputs[:2], causal=False, config=HyperConfig(), seed=0)
    with pytest.raises(UnsupportedError, match="hyper_attention on CUDA") as refusal:
        cuda.forward_hyper(*inputs, *plan, 0.25)
    assert len(refusal.value.reasons) == 3


LENGTHS = torch.tensor([3, 9])


def test_attention_to_a_cache_goes_to_triton():
    head_map = head_maps()["uneven"]
    inputs = qkv(head_map, 2, (1, 9))
    out = cuda.decode(*inputs, LENGTHS, None, head_map.q_to_k, head_map.q_to_v, None, 0.25, 0.0)
    expected = reference.attention_decode(*inputs, cache_lengths=LENGTHS, head_map=head_map)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    queries = torch.randn(2, 3, 1, 16), torch.randn(2, 3, 1, 8)
    cache = torch.randn(2, 9, 24)
    torch.testing.assert_close(
        cuda.latent_decode(*queries, cache, LENGTHS, None, 0.2),
        reference.mla_decode(*queries, cache, cache_lengths=LENGTHS, scale=0.2),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_refusal_to_attend_to_a_cache_names_every_reason():
    inputs = qkv(head_maps()["gqa"], 1, (1, 3), (300, 4), dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="attention_decode on CUDA") as refusal:
        cuda.decode(*inputs, LENGTHS[:1], None, None, None, None, 0.25, 0.0)
    assert len(refusal.value.reasons) == 3
    queries = [torch.randn(1, 1, 1, dim, dtype=torch.float64) for dim in (600, 64)]
    with pytest.raises(UnsupportedError, match="mla_decode on CUDA") as refusal:
        cuda.latent_decode(*queries, torch.randn(1, 3, 664).double(), LENGTHS[:1], None, 0.1)
    assert len(refusal.value.reasons) == 3


def test_hyper_attention_goes_to_triton():
    inputs = qkv(head_maps()["gqa"], 1, (24, 30), requires_grad=True)
    config = HyperConfig(block_size=8, sample_size=8, leaf_size=16, window=4, exact_below=2)
    plan = make_plan(*inputs[:2], causal=True, config=config, seed=0)
    with torch.no_grad():
        out, lse = cuda.forward_hyper(*inputs, *plan, 0.25)
    expected, expected_lse = reference.hyper_attention(*inputs, plan, scale=0.25)
    torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=1e-4, atol=1e-4)
    grad_out = torch.randn_like(out)
    with torch.no_grad():
        grads = cuda.backward_hyper(grad_out, None, *inputs, out, lse, *plan, 0.25)
    torch.testing.assert_close(
        tuple(grads), torch.autograd.grad(expected, inputs, grad_out), rtol=1e-4, atol=1e-4
    )
