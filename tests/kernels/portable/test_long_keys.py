"""From some length on, shared keys and values are laid out anew; nothing else may change."""

import pytest
import torch

import efficient_attn as ea
from efficient_attn.kernels.portable import flash_cpu
from efficient_attn.testing import head_maps, qkv

MAPS = head_maps()


@pytest.mark.parametrize("dims", [(16, 16), (8, 24), (24, 8)], ids=str)
@pytest.mark.parametrize("name", ["gqa", "uneven", "more value heads", "one row per sample"])
def test_long_keys_give_what_short_ones_give(name, dims, monkeypatch):
    inputs = qkv(MAPS[name], lengths=(5, 9), dims=dims, dtype=torch.float64, requires_grad=True)
    grad_out = torch.randn(2, 6, 5, dims[1], dtype=torch.float64)

    def run():
        out, lse = ea.attention(*inputs, head_map=MAPS[name], causal=True, return_lse=True)
        return out, lse, *torch.autograd.grad(out, inputs, grad_out)

    short = run()
    monkeypatch.setattr(flash_cpu, "_LONG", 5)
    torch.testing.assert_close(run(), short)
