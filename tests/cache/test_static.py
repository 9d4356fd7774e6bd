"""StaticCache against lists of tokens."""

import pytest
import torch

from efficient_attn import UnsupportedError
from efficient_attn.cache import KeyValueRows, LatentRows, StaticCache
from efficient_attn.errors import CacheFullError


def contents(cache):
    """The rows of each sequence, by part."""
    return [
        [view[b, ..., :length, :] for view in cache.filled()]
        for b, length in enumerate(cache.lengths.tolist())
    ]


def assert_holds(cache, expected):
    torch.testing.assert_close(contents(cache), expected, rtol=0, atol=0)
    assert cache.host_lengths == cache.lengths.tolist()


def cut(new, b, start, stop):
    return [x[b, ..., start:stop, :] for x in new]


def joined(*pieces):
    return [torch.cat(parts, -2) for parts in zip(*pieces, strict=True)]


def test_tokens_are_appended_evenly_and_raggedly(rows, new_tokens, poisoned_memory):
    cache = StaticCache(rows, 3, 12)
    first, second, third = (new_tokens(rows, 3, n) for n in (4, 5, 1))
    cache.append(*first)
    assert not cache.is_ragged
    assert_holds(cache, [cut(first, b, 0, 4) for b in range(3)])
    cache.append(*second, counts=[2, 0, 5])  # the last 2 of 5, none, all
    cache.append(*third)
    expected = [
        joined(cut(first, b, 0, 4), cut(second, b, 5 - count, 5), cut(third, b, 0, 1))
        for b, count in enumerate([2, 0, 5])
    ]
    assert cache.is_ragged and cache.longest == 10
    assert_holds(cache, expected)


def test_crop_reset_and_reorder(rows, new_tokens):
    cache = StaticCache(rows, 3, 8)
    new = new_tokens(rows, 3, 6)
    memory = [x.data_ptr() for x in (*cache.parts, cache.lengths)]
    cache.append(*new)
    cache.reorder(torch.tensor([2, 0, 2]))
    assert_holds(cache, [cut(new, b, 0, 6) for b in (2, 0, 2)])
    cache.crop([4, 9, 0])
    assert_holds(cache, [cut(new, b, 0, n) for b, n in ((2, 4), (0, 6), (2, 0))])
    cache.reorder([1, 0, 0])
    assert_holds(cache, [cut(new, b, 0, n) for b, n in ((0, 6), (2, 4), (2, 4))])
    cache.crop(5)
    assert cache.host_lengths == [5, 4, 4]
    cache.reset()
    assert cache.longest == 0
    cache.append(*new)
    assert_holds(cache, [cut(new, b, 0, 6) for b in range(3)])
    assert [x.data_ptr() for x in (*cache.parts, cache.lengths)] == memory


def test_positions_go_on_where_a_sequence_ends(new_tokens):
    rows = LatentRows(4, 2)
    cache = StaticCache(rows, 2, 9)
    assert cache.positions(3).tolist() == [0, 1, 2]
    cache.append(*new_tokens(rows, 2, 3), counts=[1, 3])
    assert cache.positions(2).tolist() == [[1, 2], [3, 4]]
    assert cache.positions(3, [0, 2]).tolist() == [[0, 0, 0], [2, 3, 4]]
    assert cache.positions(3, [3, 1]).tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_formula(rows, dtype):
    cache = StaticCache(rows, 3, 11, dtype=dtype)
    per_token = {
        KeyValueRows(2, 3, 5, 4): 2 * 5 + 3 * 4,
        KeyValueRows(3, 1, 4, 7): 3 * 4 + 1 * 7,
        LatentRows(6, 2): 8,
        LatentRows(6, 0): 6,
    }[rows]
    assert cache.nbytes == 3 * 11 * per_token * dtype.itemsize
    assert cache.nbytes == StaticCache.bytes_needed(rows, 3, 11, dtype)
    assert cache.nbytes == sum(x.numel() * x.element_size() for x in cache.parts)


def test_a_full_cache_is_left_as_it_was(rows, new_tokens):
    cache = StaticCache(rows, 2, 5)
    new = new_tokens(rows, 2, 4)
    cache.append(*new, counts=[1, 4])
    with pytest.raises(CacheFullError, match="sequence 1 has 4 cached tokens and gets 2 more.*=5"):
        cache.append(*new_tokens(rows, 2, 2))
    assert_holds(cache, [cut(new, 0, 3, 4), cut(new, 1, 0, 4)])
    cache.append(*new_tokens(rows, 2, 2), counts=[2, 1])
    assert cache.host_lengths == [3, 5]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda k, v: (k,), TypeError, "takes key and value; 1 tensors"),
        (lambda k, v: (k[:1], v), ValueError, r"key has shape \(1, 2, 3, 5\).*\(2, 2, tokens, 5\)"),
        (lambda k, v: (k, v[:, :2]), ValueError, r"value has shape .*\(2, 3, tokens, 4\)"),
        (lambda k, v: (k, v[..., 0]), ValueError, "value has shape"),
        (lambda k, v: (k, v[:, :, :2]), ValueError, "value has 2 tokens and key 3"),
        (lambda k, v: (k, v.double()), TypeError, r"float64 and the cache torch.float32; make"),
        (lambda k, v: (k.to("meta"), v), ValueError, "on meta and the cache on cpu"),
        (lambda k, v: (k, v.requires_grad_()), UnsupportedError, "carry a gradient"),
    ],
)
def test_tokens_that_are_refused(change, kind, message, new_tokens):
    rows = KeyValueRows(2, 3, 5, 4)
    cache = StaticCache(rows, 2, 8)
    with pytest.raises(kind, match=message):
        cache.append(*change(*new_tokens(rows, 2, 3)))
    assert cache.host_lengths == [0, 0]


def test_arguments_that_are_refused(new_tokens):
    rows = LatentRows(4, 2)
    cache = StaticCache(rows, 2, 8)
    new = new_tokens(rows, 2, 3)
    for counts in ([1], [1, 4], [-1, 2]):
        with pytest.raises(ValueError, match="pass 2 integers, one for each sequence, from 0 to 3"):
            cache.append(*new, counts=counts)
    with pytest.raises(TypeError, match="counts.tolist"):
        cache.append(*new, counts=torch.tensor([1, 2]))
    for lengths in (-1, [1], [1, -2]):
        with pytest.raises(ValueError, match="none negative"):
            cache.crop(lengths)
    with pytest.raises(ValueError, match="it must have 2, the batch"):
        cache.reorder(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"in \[0, 2\)"):
        cache.reorder([0, 2])
    with pytest.raises(ValueError, match="capacity 0"):
        StaticCache(rows, 1, 0)
    with pytest.raises(ValueError, match="num_value_heads is 0"):
        KeyValueRows(1, 0, 4, 4)
    with pytest.raises(ValueError, match="kv_lora_rank is 0"):
        LatentRows(0, 4)
