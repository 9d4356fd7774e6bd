"""The choice on CUDA, with CPU tensors and Triton's interpreter in the place of a device."""

import pytest
import torch

from efficient_attn import UnsupportedError, reference
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
