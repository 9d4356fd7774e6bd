"""What the kernels read and write: strides, poison, sizes of zero, repeatability."""

import pytest
import torch

from efficient_attn.head_map import HeadMap
from tests.kernels.triton.oracle import DEVICE, PAIR, Call, compare


@pytest.mark.parametrize("layout", ["tokens", "heads", "strided", "broadcast"])
def test_any_strides(layout):
    compare(Call.random(batch=2, lengths=(20, 35), layout=layout, options={"causal": True}))


def test_gradients_of_any_strides():
    call = Call.random(lengths=(20, 35))
    out, lse = call.forward()
    grads = (torch.randn(1, 1, 1, 1).expand_as(out), torch.randn(lse.shape[::-1]).permute(2, 1, 0))
    grads = tuple(x.to(DEVICE) for x in grads)
    given = call.backward(*grads, out, lse)
    copied = call.backward(*(x.contiguous() for x in grads), out, lse)
    for a, b in zip(given, copied, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_results_are_stored_tokens_major():
    for x in compare(Call.random(HeadMap.gqa(4, 2), lengths=(5, 7))):
        assert (x if x.dim() == 3 else x.transpose(1, 2)).is_contiguous()


@pytest.mark.skipif(DEVICE == "cuda", reason="only the CPU hands out memory that is never touched")
def test_offsets_beyond_32_bits():
    # Ten rows, one every 2**28 elements: the last begins 2**31 elements behind the first.
    rows, stride = 10, 2**28
    storage = torch.empty(rows * stride, dtype=torch.float16, device=DEVICE)
    wide = storage.as_strided((1, 1, rows, 16), (0, 0, stride, 1))
    call = Call.random(HeadMap.mha(1), lengths=(rows, rows), dtype=torch.float16)
    wide.copy_(call.key)
    apart = Call(wide, wide, wide, call.head_map)
    together = Call(*(wide.contiguous() for _ in range(3)), call.head_map)
    out, lse = together.forward()
    for a, b in zip(apart.forward(), (out, lse), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    grads = [x.backward(out, lse, out, lse) for x in (apart, together)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


LENGTHS = [35, 0, 11]


@pytest.mark.parametrize("causal", [False, True])
def test_keys_beyond_the_lengths_are_never_read(causal, poisoned_memory):
    options = {"causal": causal, "key_lengths": torch.tensor(LENGTHS, device=DEVICE)}
    call = Call.random(batch=3, lengths=(40, 70), options=options)
    clean = compare(call)
    for b, length in enumerate(LENGTHS):
        call.key[b, :, length:] = torch.nan
        call.value[b, :, length:] = torch.nan
    out, lse = call.forward()
    torch.manual_seed(1)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = call.backward(grad_out, grad_lse, out, lse)
    torch.testing.assert_close(out, clean[0], rtol=0, atol=0)
    assert all(x.isfinite().all() for x in grads)
    for b, length in enumerate(LENGTHS):
        assert not grads[1][b, :, length:].any() and not grads[2][b, :, length:].any()


def test_the_bias_beyond_the_lengths_is_never_read(poisoned_memory):
    bias = torch.randn(2, 1, 5, 70, device=DEVICE)
    lengths = torch.tensor([33, 70], device=DEVICE)
    call = Call.random(batch=2, lengths=(5, 70), options={"bias": bias, "key_lengths": lengths})
    clean, _ = call.forward()
    bias[0, :, :, 33:] = torch.nan
    out, lse = call.forward()
    torch.testing.assert_close(out, clean, rtol=0, atol=0)
    grads = call.backward(out, lse, out, lse)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[3][0, :, :, 33:].any()


def test_rows_with_nothing_to_attend_to(poisoned_memory):
    # 40 queries on 10 keys: the first 30 stand before the first key.
    call = Call.random(lengths=(40, 10), options={"causal": True})
    out, lse, grad_query, *_ = compare(call)
    assert (lse[..., :30] == -torch.inf).all() and lse[..., 30:].isfinite().all()
    assert not out[:, :, :30].any() and not grad_query[:, :, :30].any()


def test_a_log_sum_exp_gradient_of_nan_does_not_leave_a_row_with_nothing_to_attend_to():
    call = Call.random(lengths=(40, 10), options={"causal": True})
    out, lse = call.forward()
    grad_lse = torch.zeros_like(lse).masked_fill(lse == -torch.inf, torch.nan)
    for grad in call.backward(torch.ones_like(out), grad_lse, out, lse):
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("batch", "lengths"), [(0, (4, 4)), (2, (0, 4)), (2, (4, 0)), (1, (0, 0))], ids=str
)
def test_sizes_of_zero(batch, lengths, poisoned_memory):
    bias = torch.zeros(lengths[0], 1, device=DEVICE)
    results = compare(Call.random(batch=batch, lengths=lengths, options={"bias": bias}))
    for x in results:
        assert not x.isnan().any()


def test_results_are_repeatable_to_the_bit():
    options = {"causal": True, "bias": torch.randn(1, 1, 20, 35, device=DEVICE)}
    call = Call.random(HeadMap.from_index([1, 0, 1]), batch=2, lengths=(20, 35), options=options)
    out, lse = call.forward()
    first = [out, lse, *call.backward(out, lse, out, lse)]
    again = [*call.forward(), *call.backward(out, lse, out, lse)]
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_sample_does_not_depend_on_its_neighbours():
    call = Call.random(batch=3, lengths=(20, 35), options={"causal": True})
    alone = Call(call.query[1:2], call.key[1:2], call.value[1:2], PAIR, call.options)
    together = [*call.forward()]
    results = [*alone.forward()]
    together += call.backward(*together, *together)
    results += alone.backward(*results, *results)
    for a, b in zip(together, results, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=0, atol=0)
