"""Forward and backward of the packed kernels against the reference in fp64."""

import pytest
import torch

from efficient_attn import reference
from efficient_attn.head_map import HeadMap
from efficient_attn.kernels.triton import attention_bwd, attention_fwd
from efficient_attn.masking import window_limits
from efficient_attn.testing import assert_accurate
from tests.kernels.triton.oracle import DEVICE, NAMES, PAIR, Call

# Longer and shorter than a tile, a token, nothing to ask, nothing to see.
LENGTHS_Q, LENGTHS_K = [20, 70, 1, 0, 5], [35, 33, 40, 4, 0]


def ends(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0).to(DEVICE, dtype)


def inputs(head_map, dim=16, value_dim=16, dtype=torch.float32, extra=0):
    tokens_q, tokens_k = sum(LENGTHS_Q) + extra, sum(LENGTHS_K) + extra
    shapes = (
        (tokens_q, head_map.num_q_heads, dim),
        (tokens_k, head_map.num_k_heads, dim),
        (tokens_k, head_map.num_v_heads, value_dim),
    )
    return [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]


def run(tensors, head_map, causal=False, window=None, softcap=0.0, index=torch.int32):
    """out, lse, the weights of the loss, and the gradients."""
    head_map = head_map.to(DEVICE)
    packing = (ends(LENGTHS_Q, index), ends(LENGTHS_K, index), max(LENGTHS_Q), max(LENGTHS_K))
    options = (
        head_map.q_to_k,
        head_map.q_to_v,
        *window_limits(causal, window),
        tensors[0].shape[-1] ** -0.5,
        softcap,
    )
    out, lse = attention_fwd.forward_varlen(*tensors, *packing, *options)
    weights = torch.randn_like(out), torch.randn_like(lse)
    grads = attention_bwd.backward_varlen(*weights, *tensors, out, lse, *packing, *options)
    return [out, lse, *grads], weights


def expected(tensors, head_map, weights, dtype, **options):
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out, lse = reference.attention_varlen(
        *leaves,
        cu_seqlens_q=ends(LENGTHS_Q),
        cu_seqlens_k=ends(LENGTHS_K),
        head_map=head_map.to(DEVICE),
        **options,
    )
    weights = [x.to(dtype) for x in weights]
    return [out, lse, *torch.autograd.grad((out, lse), leaves, weights)]


def compare(head_map=PAIR, *, floor=2e-6, index=torch.int32, options=None, **shape):
    options = options or {}
    tensors = inputs(head_map, **shape)
    results, weights = run(tensors, head_map, index=index, **options)
    truths = expected(tensors, head_map, weights, torch.float64, **options)
    plains = expected(tensors, head_map, weights, tensors[0].dtype, **options)
    for name, result, truth, plain in zip(NAMES, results, truths, plains, strict=False):
        assert result.shape == truth.shape, name
        assert_accurate(result, truth, plain, floor=floor)
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (9, 3)},
        {"causal": True, "window": (40, None), "softcap": 2.0},
    ],
    ids=str,
)
def test_options(options, poisoned_memory):
    compare(options=options)


@pytest.mark.parametrize(
    "head_map",
    [
        HeadMap.from_group_sizes([1, 0, 2]),
        HeadMap.diff(4, k=1, v=2),
        HeadMap.from_index([[0, 1], [1, 1], [1, 0], [0, 0], [1, 0]]),
        HeadMap.from_index([[0, 1], [1, 1], [1, 0], [0, 0], [1, 0]], [0, 0], num_v_heads=1),
    ],
    ids=["uneven", "diff", "one row per sequence", "one row per sequence for keys"],
)
def test_head_maps(head_map):
    compare(head_map, options={"causal": True})


def test_half_precision_and_awkward_dims():
    compare(dtype=torch.bfloat16, dim=40, value_dim=24, floor=4e-3)


def test_long_cumulative_lengths():
    compare(index=torch.int64)


def test_equals_dense_calls_to_the_bit():
    tensors = inputs(PAIR)
    (out, lse, *_), _ = run(tensors, PAIR, causal=True)
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in tensors)
    first = Call(query[:, :, :20], key[:, :, :35], value[:, :, :35], None, {"causal": True})
    dense_out, dense_lse = first.forward()
    torch.testing.assert_close(out[:20].transpose(0, 1), dense_out[0], rtol=0, atol=0)
    torch.testing.assert_close(lse[:20].T, dense_lse[0], rtol=0, atol=0)


def test_tokens_of_no_sequence_attend_to_nothing(poisoned_memory):
    tensors = inputs(PAIR, extra=3)
    (out, lse, *grads), _ = run(tensors, PAIR)
    assert not out[-3:].any() and (lse[-3:] == -torch.inf).all()
    assert not any(grad[-3:].any() for grad in grads)


def test_sequences_do_not_read_their_neighbours():
    tensors = inputs(PAIR)
    results, weights = run(tensors, PAIR, causal=True)
    # The second sequence's keys and queries become NaN; nobody else may notice.
    tensors[0][20:90] = torch.nan
    tensors[1][35:68] = torch.nan
    tensors[2][35:68] = torch.nan
    torch.manual_seed(0)
    poisoned, _ = run(tensors, PAIR, causal=True)
    for a, b in zip(results[:2], poisoned[:2], strict=True):
        for sequence in (slice(0, 20), slice(90, None)):
            torch.testing.assert_close(a[sequence], b[sequence], rtol=0, atol=0)
    for grad, sequence in zip(
        poisoned[2:], (slice(0, 20), slice(0, 35), slice(0, 35)), strict=True
    ):
        assert grad[sequence].isfinite().all()


def test_no_sequences():
    empty = torch.zeros(0, 2, 16, device=DEVICE)
    packing = (ends([]), ends([]), 0, 0)
    options = (None, None, None, None, 0.25, 0.0)
    out, lse = attention_fwd.forward_varlen(empty, empty, empty, *packing, *options)
    assert out.shape == (0, 2, 16) and lse.shape == (0, 2)
    grads = attention_bwd.backward_varlen(
        out, lse, empty, empty, empty, out, lse, *packing, *options
    )
    assert [x.shape for x in grads] == [(0, 2, 16)] * 3
