"""`attention_varlen` against the reference, sequence by sequence."""

import pytest
import torch

import efficient_attn as ea
from efficient_attn import HeadMap, reference
from efficient_attn.testing import head_maps

LENGTHS = ((3, 5), (0, 2), (4, 0), (1, 1), (9, 6))
CU_Q, CU_K = (torch.tensor([0, *n]).cumsum(0).int() for n in zip(*LENGTHS, strict=True))
PACKING = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
MAPS = head_maps(batch=len(LENGTHS))


def packed(head_map, dim=8, value_dim=6, dtype=torch.float64):
    return [
        torch.randn(tokens, heads, d, dtype=dtype, requires_grad=True)
        for tokens, heads, d in (
            (17, head_map.num_q_heads, dim),
            (14, head_map.num_k_heads, dim),
            (14, head_map.num_v_heads, value_dim),
        )
    ]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 1), "softcap": 1.0}])
@pytest.mark.parametrize("name", MAPS)
def test_every_head_map(name, options, poisoned_memory):
    inputs, options = packed(MAPS[name]), {"head_map": MAPS[name], **PACKING, **options}
    actual = ea.attention_varlen(
        *inputs, **options, max_seqlen_q=9, max_seqlen_k=6, return_lse=True
    )
    expected = reference.attention_varlen(*inputs, **options)
    torch.testing.assert_close(actual, expected)
    seen = expected[1] > -torch.inf
    grads = [torch.randn_like(expected[0]), torch.randn_like(expected[1])]
    for pair in zip(
        *(
            torch.autograd.grad([out, lse[seen]], inputs, [grads[0], grads[1][seen]])
            for out, lse in (actual, expected)
        ),
        strict=True,
    ):
        torch.testing.assert_close(*pair)


def test_sequences_do_not_see_each_other():
    inputs = [x.detach() for x in packed(HeadMap.gqa(4, 2))]
    call = {**PACKING, "max_seqlen_q": 9, "max_seqlen_k": 6}
    before = ea.attention_varlen(*inputs, **call)
    # One key only: over a few keys, all of them NaN, torch's op finds no maximum and gives zeros.
    inputs[1][CU_K[0]] = torch.nan
    after = ea.attention_varlen(*inputs, **call)
    assert after[: CU_Q[1]].isnan().any()
    assert torch.equal(after[CU_Q[1] :], before[CU_Q[1] :])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 9, 4, 17])}, ValueError, "ascend from 0 to 17"),
        ({"cu_seqlens_q": torch.tensor([1, 9, 12, 17])}, ValueError, "ascend from 0 to 17"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 9, 13])}, ValueError, "ascend from 0 to 14"),
        ({"cu_seqlens_k": torch.tensor([0, 14])}, ValueError, "same"),
        ({"max_seqlen_q": 7}, ValueError, "max_seqlen_q is 7, but .* 8 tokens"),
        ({"max_seqlen_k": 4}, ValueError, "max_seqlen_k is 4, but .* 5 tokens"),
        ({"cu_seqlens_q": torch.tensor([0.0, 17.0])}, TypeError, "int32 or int64"),
        ({"cu_seqlens_q": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "sequences \\+ 1"),
    ],
)
def test_packing_that_is_refused(change, kind, message):
    call = {
        "cu_seqlens_q": torch.tensor([0, 4, 9, 17]),
        "cu_seqlens_k": torch.tensor([0, 5, 9, 14]),
        "max_seqlen_q": 8,
        "max_seqlen_k": 5,
    }
    with pytest.raises(kind, match=message):
        ea.attention_varlen(*packed(HeadMap.mha(2)), **{**call, **change})
