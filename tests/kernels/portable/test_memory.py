"""Memory is linear in tokens, and no key or value head is copied out to the query heads."""

import pytest
import torch

import efficient_attn as ea
from bench.measure import peak_bytes
from efficient_attn import HeadMap
from efficient_attn.testing import qkv

DIM = 16
UNEVEN = HeadMap.from_group_sizes([6, 40, 0, 18])
DIFF = HeadMap.diff(64, k=1, v=4)


def peak(head_map, tokens, *, backward=False, **options):
    inputs = qkv(head_map, 1, (tokens, tokens), (DIM, DIM), requires_grad=backward)
    grad_out = torch.randn(1, tokens, head_map.num_q_heads, DIM).transpose(1, 2)

    def call():
        out = ea.attention(*inputs, head_map=head_map, **options)
        return torch.autograd.grad(out, inputs, grad_out) if backward else out

    call()
    return peak_bytes(call, "cpu")


def result_bytes(head_map, tokens, backward):
    """The output, its log-sum-exp, and the gradients."""
    heads = head_map.num_q_heads
    gradients = heads + head_map.num_k_heads + head_map.num_v_heads if backward else 0
    return tokens * (heads * (DIM + 1) + gradients * DIM) * 4


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("head_map", [UNEVEN, DIFF], ids=["uneven", "more value heads"])
def test_no_key_or_value_is_copied_to_every_query_head(head_map, backward):
    """What a call takes beyond its results grows by less than one such copy alone would.

    The difference of two lengths leaves out the flash op's tiles, which grow up to 768 tokens.
    """
    short, long = (
        peak(head_map, tokens, backward=backward, causal=True)
        - result_bytes(head_map, tokens, backward)
        for tokens in (768, 1536)
    )
    copy = head_map.num_q_heads * (1536 - 768) * DIM * 4
    assert long - short < 0.75 * copy


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
