"""The gradient of a bias in every shape that broadcasts."""

import itertools

import pytest
import torch

from tests.kernels.triton.oracle import DEVICE, Call, compare

BATCH, LENGTHS = 2, (33, 66)
FULL = (BATCH, 2, *LENGTHS)


@pytest.mark.parametrize("kept", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_broadcast_shape(kept, poisoned_memory):
    shape = [size if keep else 1 for size, keep in zip(FULL, kept, strict=True)]
    bias = torch.randn(shape, device=DEVICE)
    *_, grad = compare(Call.random(batch=BATCH, lengths=LENGTHS, options={"bias": bias}))
    assert grad.is_contiguous()


@pytest.mark.parametrize("shape", [(), (66,), (33, 1), (2, 33, 66)], ids=str)
def test_fewer_dimensions(shape):
    bias = torch.randn(shape, device=DEVICE)
    compare(Call.random(batch=BATCH, lengths=LENGTHS, options={"bias": bias, "causal": True}))


def test_with_everything_else():
    options = {
        "bias": torch.randn(1, 2, 33, 66, device=DEVICE),
        "window": (20, 10),
        "softcap": 2.0,
        "key_lengths": torch.tensor([66, 20], device=DEVICE),
    }
    compare(Call.random(batch=BATCH, lengths=LENGTHS, options=options))


def test_minus_infinity_masks():
    bias = torch.zeros(1, 1, *LENGTHS, device=DEVICE)
    bias[..., ::3] = -torch.inf
    bias[:, :, 7] = -torch.inf
    out, lse, *_, grad = compare(Call.random(lengths=LENGTHS, options={"bias": bias}))
    assert (lse[:, :, 7] == -torch.inf).all() and not out[:, :, 7].any()
    assert not grad[bias == -torch.inf].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_bias_in_another_precision_than_the_rest(dtype):
    bias = torch.randn(1, 1, *LENGTHS, device=DEVICE, dtype=dtype)
    call = Call.random(lengths=LENGTHS, dtype=torch.bfloat16, options={"bias": bias})
    *_, grad = compare(call, floor=4e-3)
    assert grad.dtype == dtype


def test_any_strides():
    bias = torch.randn(66, 33, 2, device=DEVICE).permute(2, 1, 0)
    compare(Call.random(lengths=LENGTHS, options={"bias": bias}))
