"""Latent attention to a cache: the kernels against the reference, and how rows are cut."""

import pytest
import torch

from efficient_attn import reference
from efficient_attn.kernels.triton import decode
from efficient_attn.kernels.triton._decode_plan import Plan
from efficient_attn.testing import assert_accurate
from tests.cached_inputs import LENGTHS, in_pages
from tests.kernels.triton.cached import assert_close, assert_same, randn
from tests.kernels.triton.oracle import DEVICE


def latent(rank, rope, heads=3, tokens=1, dtype=torch.float32, room=80):
    """Queries and a cache with NaN behind the lengths."""
    queries = [
        randn(len(LENGTHS), tokens, heads, dim, dtype=dtype).transpose(1, 2) for dim in (rank, rope)
    ]
    cache = randn(len(LENGTHS), room, rank + rope, dtype=dtype)
    for b, length in enumerate(LENGTHS):
        cache[b, length:] = torch.nan
    return *queries, cache


def run(q_latent, q_rope, cache, table=None):
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    return decode.latent_decode(q_latent, q_rope, cache, lengths, table, 0.1)


def compare(*inputs, floor=2e-6):
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    options = {"cache_lengths": lengths, "scale": 0.1}
    results = run(*inputs)
    truths = reference.mla_decode(*(x.double() for x in inputs), **options)
    plains = reference.mla_decode(*inputs, **options)
    for result, truth, plain in zip(results, truths, plains, strict=True):
        assert result.shape == truth.shape
        assert_accurate(result, truth, plain, floor=floor)
    return results


@pytest.mark.parametrize(
    ("rank", "rope", "tokens"),
    [(64, 16, 1), (64, 0, 1), (48, 32, 1), (40, 24, 1), (56, 5, 3), (33, 8, 3), (10, 100, 1)],
)
def test_ranks(rank, rope, tokens, poisoned_memory):
    out, _ = compare(*latent(rank, rope, tokens=tokens))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (448, 128)], ids=str)
def test_rows_of_576(rank, rope):
    compare(*latent(rank, rope, heads=2))


@pytest.mark.parametrize("heads", [1, 16, 37])
def test_heads(heads, poisoned_memory):
    compare(*latent(32, 16, heads))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    out, lse = compare(*latent(64, 16, 4, 2, dtype), floor=2e-3)
    assert out.dtype == dtype and lse.dtype == torch.float32


@pytest.mark.parametrize("page_size", [64, 16, 24])
def test_pages(page_size, poisoned_memory):
    *queries, cache = latent(40, 24, tokens=2)
    table, pool = in_pages(LENGTHS, page_size, cache.unsqueeze(1))
    assert_close(run(*queries, pool.squeeze(1), table), run(*queries, cache))


def test_any_strides():
    inputs = [torch.stack([x, x], -1)[..., 1] for x in latent(32, 8)]
    assert_same(run(*inputs), run(*(x.contiguous() for x in inputs)))


def test_results_are_repeatable_to_the_bit():
    inputs = latent(32, 16)
    assert_same(run(*inputs), run(*inputs))


@pytest.mark.parametrize(
    ("rank", "rope", "blocks"),
    [
        (512, 64, (512, 64)),
        (448, 128, (512, 64)),
        (320, 256, (512, 64)),
        (512, 0, (512, 0)),
        (384, 64, (512, 0)),
        (256, 32, (256, 32)),
        (192, 64, (256, 0)),
        (130, 128, (256, 16)),
        (8, 0, (16, 0)),
        (512, 128, (512, 128)),
    ],
    ids=str,
)
def test_the_first_block_of_a_row_holds_the_latent(rank, rope, blocks):
    queries = [torch.empty(1, 1, 1, dim, device="meta") for dim in (rank, rope)]
    cache = torch.empty(1, 1, 9, rank + rope, device="meta")
    assert Plan(*queries, cache, None, cache, None).key_blocks == blocks


def test_refusals_name_every_reason():
    queries = [torch.zeros(1, 1, 1, dim, dtype=torch.float64) for dim in (520, 128)]
    reasons = decode.latent_refusals(*queries)
    assert len(reasons) == 3
    for word, reason in zip(("520;", "648 wide", "float64"), reasons, strict=True):
        assert word in reason
    assert decode.latent_refusals(*(torch.zeros(1, 1, 1, dim) for dim in (512, 64))) == []
