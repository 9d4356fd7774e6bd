"""Memory is linear in tokens, and no key or value head is copied out to the query heads."""

import pytest
import torch

import efficient_attn as ea
from bench.measure import peak_bytes
from efficient_attn import HeadMap
from efficient_attn.testing import qkv

DIM = 16
UNEVEN = HeadMap.from_group_sizes([3, 20, 0, 9])
DIFF = HeadMap.diff(32, k=2, v=8)


def peak(head_map, tokens, *, backward=False, **options):
    inputs = qkv(head_map, 1, (tokens, tokens), (DIM, DIM), requires_grad=backward)

    def call():
        out = ea.attention(*inputs, head_map=head_map, **options)
        return torch.autograd.grad(out.sum(), inputs) if backward else out

    call()
    return peak_bytes(call, "cpu")


@pytest.mark.parametrize("head_map", [UNEVEN, DIFF], ids=["uneven", "more value heads"])
def test_the_forward_holds_its_result_and_one_group(head_map):
    tokens = 1024
    result = 32 * tokens * (DIM + 1) * 4
    largest_group = 20 * tokens * (DIM + 1) * 4
    slack = 2 << 20  # the flash op's own tiles
    assert peak(head_map, tokens, causal=True) < result + largest_group + slack


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "softcap": 20.0},
        {"window": (100, 50)},
    ],
    ids=["causal", "softcap", "window"],
)
@pytest.mark.parametrize(
    "head_map", [HeadMap.gqa(4, 2), HeadMap.from_group_sizes([3, 1])], ids=["even", "uneven"]
)
def test_memory_is_linear_in_tokens(head_map, options):
    small, large = (peak(head_map, n, backward=True, **options) for n in (1024, 2048))
    # The blocked kernel holds a fixed number of scores, which do not grow at all.
    assert large < 2.3 * small
