"""What was appended is what attention reads, from either kind of cache."""

import pytest
import torch

import efficient_attn as ea
from efficient_attn import HeadMap, reference
from efficient_attn.cache import KeyValueRows, LatentRows, PagedCache, StaticCache

COUNTS = [11, 0, 7, 12]


@pytest.fixture(params=["static", "paged"])
def fill(request, poisoned_memory):
    """Makes a cache that holds ragged tokens and NaN where there are none, in several steps."""

    def make(rows, *dense):
        batch_size = len(COUNTS)
        if request.param == "static":
            cache = StaticCache(rows, batch_size, 14, dtype=torch.float64)
        else:
            pool = PagedCache(rows, 12, 4, dtype=torch.float64)
            pool.batch([pool.allocate()]).append(*(x[:1, ..., :9, :] for x in dense))
            cache = pool.batch([pool.allocate() for _ in COUNTS])
            pool.free(0)  # its pages hold another's tokens from here on
        for start, stop in ((0, 3), (3, 4), (4, 14)):
            steps = [max(min(count, stop) - start, 0) for count in COUNTS]
            new = [torch.full_like(x[..., start:stop, :], torch.inf) for x in dense]
            for b, step in enumerate(steps):
                for padded, x in zip(new, dense, strict=True):
                    padded[b, ..., stop - start - step :, :] = x[b, ..., start : start + step, :]
            cache.append(*new, counts=steps)
        assert cache.host_lengths == COUNTS
        return cache

    return make


@pytest.mark.parametrize("tokens", [1, 3])
def test_keys_and_values(fill, tokens):
    head_map = HeadMap.from_index([2, 0, 1, 0, 2], [0, 1, 1, 0, 1])
    query = torch.randn(4, 5, tokens, 6).double()
    key, value = torch.randn(4, 3, 14, 6).double(), torch.randn(4, 2, 14, 3).double()
    options = {"head_map": head_map, "softcap": 2.0, "window": (5, 0)}
    expected = reference.attention_decode(
        query, key, value, cache_lengths=torch.tensor(COUNTS), **options
    )
    cache = fill(KeyValueRows.for_map(head_map, 6, 3), key, value)
    places = {"cache_lengths": cache.lengths, "block_table": cache.block_table}
    actual = ea.attention_decode(query, *cache.parts, **places, **options, return_lse=True)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_latents(fill, tokens):
    queries = [torch.randn(4, 5, tokens, dim).double() for dim in (6, 2)]
    latent = torch.randn(4, 14, 8).double()
    expected = reference.mla_decode(*queries, latent, cache_lengths=torch.tensor(COUNTS), scale=0.4)
    cache = fill(LatentRows(6, 2), latent)
    places = {"cache_lengths": cache.lengths, "block_table": cache.block_table}
    actual = ea.mla_decode(*queries, *cache.parts, **places, scale=0.4, return_lse=True)
    torch.testing.assert_close(actual, expected)
