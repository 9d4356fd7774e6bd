"""Norms and groups in Triton against their reference, to the bit where both are the same sums."""

import pytest
import torch

from efficient_attn.kernels.triton import grouping
from efficient_attn.reference import grouping as reference
from tests.kernels.triton.oracle import DEVICE


# NumPy, which the interpreter computes with, says aloud what scores without meaning make.
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("min_max", [False, True])
@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize(
    ("groups", "num_heads"), [(1, 4), (2, 6), (5, 3), (6, 12), (8, 32), (33, 128)]
)
def test_groups_are_those_of_the_reference(groups, num_heads, min_max, nearest):
    scores = torch.rand(12, groups) + 0.5
    scores[0], scores[1], scores[2, 0], scores[3, -1] = 1.0, 0.0, torch.nan, torch.inf
    scores[4, 0], scores[5], scores[6] = -1.0, 3e38, torch.arange(groups).float()
    for least in {0, num_heads // groups}:
        options = (num_heads, least, min_max, nearest)
        found = grouping.allocate_heads(scores.to(DEVICE), *options)
        for ours, theirs in zip(found, reference.allocate_heads(scores, *options), strict=True):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [20, 64, 100])
def test_norms_are_those_of_the_reference(dtype, dim):
    key = torch.randn(2, 75, 3, dim, dtype=dtype, device=DEVICE).transpose(1, 2)
    for lengths in (None, torch.tensor([75, 0]), torch.tensor([70, 9], dtype=torch.int32)):
        on_device = None if lengths is None else lengths.to(DEVICE)
        norms = grouping.key_norms(key, on_device).cpu()
        expected = reference.key_norms(key.cpu(), lengths)
        torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)


def test_neither_padding_nor_strides_change_a_bit():
    key = torch.randn(2, 3, 80, 24, device=DEVICE)
    lengths = torch.tensor([80, 33], device=DEVICE)
    key[1, :, 33:] = torch.nan
    norms = grouping.key_norms(key, lengths)
    behind = key.new_full((2, 3, 100, 24), torch.inf)
    assert torch.equal(grouping.key_norms(torch.cat([key, behind], 2), lengths), norms)
    apart = torch.randn(2, 3, 80, 24, 2, device=DEVICE)[..., 1].copy_(key)
    assert torch.equal(grouping.key_norms(apart, lengths), norms)
    assert torch.equal(grouping.key_norms(key[1:, :, :33], None), norms[1:])


def test_nothing_to_do():
    assert grouping.key_norms(torch.empty(0, 3, 4, 8, device=DEVICE), None).shape == (0, 3)
    empty = torch.zeros(2, 3, device=DEVICE)
    assert torch.equal(grouping.key_norms(torch.empty(2, 3, 0, 8, device=DEVICE), None), empty)
    sizes, index = grouping.allocate_heads(empty[:0], 6, 0, False, False)
    assert sizes.shape == (0, 3) and index.shape == (0, 6)
