"""Joined heads give what the separate ones give."""

import pytest
import torch

from efficient_attn import HeadMap
from efficient_attn.integrations.wide_heads import own_part, widen
from efficient_attn.reference.attention import attention

TRIPLES = [(32, 4, 16), (32, 16, 4), (24, 4, 6), (12, 4, 6), (24, 8, 12), (6, 3, 2), (8, 8, 2),
           (8, 1, 8), (8, 8, 1), (5, 5, 5)]  # fmt: skip


@pytest.mark.parametrize("heads", TRIPLES)
def test_joined_heads_are_exact(heads, poisoned_memory):
    queries, keys, values = heads
    torch.manual_seed(0)
    query, key = torch.randn(2, queries, 5, 3).double(), torch.randn(2, keys, 7, 3).double()
    value = torch.randn(2, values, 7, 4).double()
    expected, _ = attention(
        query, key, value, head_map=HeadMap.diff(queries, k=keys, v=values), causal=True
    )
    wide_query, wide_key, wide_value = widen(query, key, value)
    assert wide_key.shape[1] == wide_value.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        wide_query, wide_key, wide_value, enable_gqa=True, scale=3**-0.5,
        attn_mask=torch.ones(5, 7).bool().tril(2),
    )  # fmt: skip
    out = own_part(out.transpose(1, 2), keys, values).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


def test_queries_are_not_padded_where_each_key_head_has_several_value_heads():
    query, key, value = torch.zeros(1, 8, 5, 3), torch.zeros(1, 2, 7, 3), torch.zeros(1, 4, 7, 4)
    shapes = [x.shape for x in widen(query, key, value)]
    assert shapes == [query.shape, key.shape, (1, 2, 7, 8)]
