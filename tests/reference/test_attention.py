"""The reference against equations written out once more, number by number."""

import math

import pytest
import torch

from efficient_attn import HeadMap
from efficient_attn.reference import attention, attention_varlen, merge_states
from efficient_attn.testing import head_maps, qkv


def by_hand(query, key, value, head_map, visible, scale, softcap=0.0):
    """Attention with scalar loops, one head and one query at a time."""
    batch, heads, nq, _ = query.shape
    k_index = head_map.key_index().expand(batch, -1).tolist()
    v_index = head_map.value_index().expand(batch, -1).tolist()
    out = torch.zeros(batch, heads, nq, value.shape[-1], dtype=query.dtype)
    lse = torch.full((batch, heads, nq), -math.inf, dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(nq):
                keys = [j for j in range(key.shape[2]) if visible(i, j)]
                if not keys:
                    continue
                scores = [scale * float(query[b, h, i] @ key[b, k_index[b][h], j]) for j in keys]
                if softcap:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                total = sum(math.exp(s) for s in scores)
                lse[b, h, i] = math.log(total)
                out[b, h, i] = sum(
                    math.exp(s) / total * value[b, v_index[b][h], j]
                    for s, j in zip(scores, keys, strict=True)
                )
    return out, lse


@pytest.mark.parametrize("name", head_maps())
def test_every_head_map_by_hand(name):
    head_map = head_maps()[name]
    query, key, value = qkv(head_map, lengths=(3, 4), dims=(5, 7), dtype=torch.float64)
    out, lse = attention(query, key, value, head_map=head_map, causal=True)
    expected = by_hand(query, key, value, head_map, lambda i, j: j <= i + 1, 5**-0.5)
    torch.testing.assert_close((out, lse), expected)


def test_window_softcap_and_scale_by_hand():
    head_map = HeadMap.gqa(4, 2)
    query, key, value = qkv(head_map, lengths=(5, 3), dtype=torch.float64)
    result = attention(query, key, value, window=(1, 0), softcap=1.5, scale=0.7)
    expected = by_hand(
        query, key, value, head_map, lambda i, j: -1 <= j - (i - 2) <= 0, 0.7, softcap=1.5
    )
    torch.testing.assert_close(result, expected)
    assert (result[0][:, :, :2] == 0).all() and (result[1][:, :, :2] == -math.inf).all()


def test_key_lengths_cut_each_sample():
    head_map = HeadMap.gqa(4, 2)
    query, key, value = qkv(head_map, batch=3, lengths=(2, 5), dtype=torch.float64)
    bias = torch.randn(3, 1, 1, 5, dtype=torch.float64)
    lengths = torch.tensor([5, 2, 0])
    out, lse = attention(query, key, value, causal=True, bias=bias, key_lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        cut = slice(b, b + 1)
        expected = attention(
            query[cut], key[cut, :, :n], value[cut, :, :n], causal=True, bias=bias[cut, ..., :n]
        )
        torch.testing.assert_close((out[cut], lse[cut]), expected)
    assert (out[2] == 0).all() and (lse[2] == -math.inf).all()


def test_gradients_of_rows_that_see_nothing_are_zero_and_the_rest_right():
    query, key, value = qkv(HeadMap.mha(1), 1, (3, 2), (2, 2), dtype=torch.float64)
    query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
    bias = torch.zeros(3, 2, dtype=torch.float64)
    bias[1] = -math.inf

    def finite(query, key, value):
        out, lse = attention(query, key, value, bias=bias)
        return out, lse.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(finite, (query, key, value))


def test_packed_sequences_are_separate_calls():
    head_map = HeadMap.gqa(4, 2)
    lengths = ((3, 5), (0, 2), (4, 0), (1, 1))
    parts = [qkv(head_map, 1, n, dtype=torch.float64) for n in lengths]
    packed = [torch.cat([part[i][0].transpose(0, 1) for part in parts]) for i in range(3)]
    cu = [torch.tensor([0, *n]).cumsum(0) for n in zip(*lengths, strict=True)]
    out, lse = attention_varlen(
        *packed, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], head_map=head_map, causal=True
    )
    for i, part in enumerate(parts):
        rows = slice(cu[0][i], cu[0][i + 1])
        expected_out, expected_lse = attention(*part, head_map=head_map, causal=True)
        torch.testing.assert_close(out[rows], expected_out[0].transpose(0, 1))
        torch.testing.assert_close(lse[rows], expected_lse[0].transpose(0, 1))


def test_merging_parts_of_the_keys_gives_the_whole():
    query, key, value = qkv(HeadMap.mqa(3), lengths=(4, 9), dtype=torch.float64)
    parts = [
        attention(query, key[:, :, a:b], value[:, :, a:b]) for a, b in ((0, 2), (2, 2), (2, 9))
    ]
    merged = merge_states(*zip(*parts, strict=True))
    torch.testing.assert_close(merged, attention(query, key, value))
