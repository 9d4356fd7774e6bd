"""mla_decode in CUDA, on an emulated machine and, where there is one, on a device."""

import pytest
import torch

from tests.cached_inputs import LENGTHS, in_pages
from tests.csrc.cuda_machines import Machine, compare_latent

BF16, FP16 = torch.bfloat16, torch.float16


def latent(rank, rope, heads=3, tokens=1, lengths=LENGTHS, dtype=BF16):
    """Queries, parts of one tensor, and a cache with NaN behind the lengths."""
    query = torch.randn(len(lengths), tokens, heads, rank + rope, dtype=dtype).transpose(1, 2)
    cache = torch.randn(len(lengths), max(lengths), rank + rope, dtype=dtype)
    for b, length in enumerate(lengths):
        cache[b, length:] = torch.nan
    return *query.split([rank, rope], -1), cache


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("rank", "rope"), [(512, 64), (256, 64), (448, 128), (320, 0), (64, 24), (8, 0)], ids=str
)
def test_ranks(machine, rank, rope, dtype, poisoned_memory):
    out, _ = compare_latent(machine, *latent(rank, rope, dtype=dtype), lengths=LENGTHS)
    assert out.transpose(1, 2).is_contiguous()


# One row; tiles of 16, full and not; tiles of 64.
@pytest.mark.parametrize(
    ("heads", "tokens"), [(1, 1), (16, 1), (17, 1), (5, 4), (33, 1), (20, 4), (3, 71)]
)
def test_heads_and_tokens(machine, heads, tokens, poisoned_memory):
    compare_latent(machine, *latent(64, 64, heads, tokens, (0, 70)), lengths=(0, 70))


@pytest.mark.parametrize("heads", [4, 40])
@pytest.mark.parametrize("page_size", [1, 24, 64])
def test_pages(machine, page_size, heads, poisoned_memory):
    *queries, cache = latent(512, 64, heads)
    table, pool = in_pages(LENGTHS, page_size, cache.unsqueeze(1))
    paged = machine.mla_decode(*queries, pool.squeeze(1), LENGTHS, table)
    dense = machine.mla_decode(*queries, cache, LENGTHS)
    torch.testing.assert_close(paged, dense, rtol=2e-2, atol=1e-3)


# Thirteen splits, which are merged in two groups; and three, with tiles of 64 rows.
@pytest.mark.parametrize(("heads", "longest"), [(4, 1600), (40, 300)])
def test_parts_are_merged_in_one_order_whoever_comes_last(
    emulated, heads, longest, poisoned_memory
):
    lengths = (longest, 200, 0)
    inputs = latent(64, 16, heads, 1, lengths, FP16)
    first = compare_latent(Machine(blocks=100), *inputs, lengths=lengths)
    again = Machine(blocks=100, seed=7).mla_decode(*inputs, lengths)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    one = Machine(blocks=1).mla_decode(*inputs, lengths)
    torch.testing.assert_close(one, first, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("rank", "rope"), [(512, 72), (520, 8), (60, 4)])
def test_ranks_that_are_not_covered_are_refused(emulated, rank, rope):
    with pytest.raises(RuntimeError, match="multiples of 8 are there"):
        Machine().mla_decode(*latent(rank, rope), LENGTHS)
