"""Batches large enough to be computed in runs of even groups."""

import pytest
import torch

import efficient_attn as ea
from efficient_attn import HeadMap, reference
from efficient_attn.kernels.portable import cutting
from efficient_attn.testing import qkv

HEADS, BATCH, TOKENS = 12, 17, 9
MAPS = {
    "uneven": HeadMap.from_group_sizes([0, 1, 2, 2, 3, 4]),
    "permuted": HeadMap.from_index([h % 6 for h in range(HEADS)]),
    "keys apart from values": HeadMap.from_index([0] * 6 + [1] * 6, [0, 0, 1, 1, 2, 2] * 2),
    "scattered": HeadMap.from_index([3, 0, 3, 1, 1, 0, 2, 3, 0, 2, 1, 3]),
    "one row per sample": HeadMap.from_index(
        torch.arange(HEADS * BATCH).reshape(BATCH, HEADS) % 5 % 3, num_k_heads=3
    ),
    "keys per sample, values even": HeadMap(
        HEADS, 4, 2, (torch.arange(HEADS * BATCH).reshape(BATCH, HEADS) % 7 % 4).int()
    ),
    "more value heads": HeadMap.diff(HEADS, k=2, v=6),
    "key even, value uneven": HeadMap(HEADS, 2, 2, None, torch.tensor([0] * 5 + [1] * 7).int()),
}


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 1)}])
@pytest.mark.parametrize("name", MAPS)
def test_runs_equal_the_reference(name, options, one_thread, poisoned_memory):
    lengths = (TOKENS, TOKENS + 2)
    inputs = qkv(MAPS[name], BATCH, lengths, (8, 8), dtype=torch.float64, requires_grad=True)
    out = ea.attention(*inputs, head_map=MAPS[name], **options)
    expected = reference.attention(*inputs, head_map=MAPS[name], **options)[0]
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn_like(out)
    grads, truth = (torch.autograd.grad(x, inputs, grad_out) for x in (out, expected))
    torch.testing.assert_close(grads, truth)


def test_uneven_groups_are_read_where_they_lie(one_thread):
    head_map = MAPS["uneven"]
    query, key, value = qkv(head_map, 16, (4, 4))
    found = list(cutting.problems(query, key, value, head_map.q_to_k, head_map.q_to_v, None, True))
    ends = [(0, 1, 1, 2), (1, 5, 2, 4), (5, 8, 4, 5), (8, 12, 5, 6)]
    assert [(p.q_heads, p.k_heads) for p in found] == [
        (slice(a, b), slice(c, d)) for a, b, c, d in ends
    ]
    query, key, value = qkv(head_map, 3, (4, 4))
    found = list(cutting.problems(query, key, value, head_map.q_to_k, head_map.q_to_v, None, True))
    assert [p.k_heads for p in found] == [[1, 2, 2, 3, 3, 4], [4, 4, 5, 5, 5, 5]]
