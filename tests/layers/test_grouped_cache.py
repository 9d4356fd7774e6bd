"""GroupedQueryAttention with a cache gives the rows of one full prefill."""

import pytest
import torch
from torch import nn

from efficient_attn import HeadMap, UnsupportedError
from efficient_attn.cache import PagedCache, StaticCache
from efficient_attn.errors import CacheFullError
from efficient_attn.layers import GroupedQueryAttention, RotaryEmbedding
from efficient_attn.testing import head_maps

EMBED, HEADS, BATCH, TOKENS = 24, 6, 3, 45
MAPS = head_maps(batch=BATCH)
OPTIONS = {
    "plain": {},
    "rotary": {"rotary": RotaryEmbedding(4)},
    "norms": {"rotary": RotaryEmbedding(4), "q_norm": nn.RMSNorm(4), "k_norm": nn.RMSNorm(4)},
    "window": {"rotary": RotaryEmbedding(4), "window": (9, 0)},
    "softcap": {"softcap": 0.7, "scale": 1.3},
    "wide values": {"v_head_dim": 7},
}
OPTIONS["all"] = {key: x for options in OPTIONS.values() for key, x in options.items()}
# New tokens of each call: a prefill, then chunks longer and shorter than what decoding takes.
CHUNKS = (17, 2, 20, 1, 5)
KINDS = ("static", "paged")


def layer(**options):
    torch.manual_seed(0)
    return GroupedQueryAttention(EMBED, HEADS, causal=True, **options).double()


def cache_for(module, kind, batch=BATCH, capacity=TOKENS, page_size=16):
    if kind == "static":
        return StaticCache(module.cache_rows, batch, capacity, dtype=torch.float64)
    pages = batch * -(-capacity // page_size)
    cache = PagedCache(module.cache_rows, pages, page_size, dtype=torch.float64)
    return cache.batch([cache.allocate() for _ in range(batch)])


@pytest.fixture(autouse=True)
def inference(one_thread):
    with torch.no_grad():
        yield


def tokens(count=TOKENS, batch=BATCH):
    torch.manual_seed(1)
    return torch.randn(batch, count, EMBED).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("head_map", "name"), [*((m, "all") for m in MAPS), *(("uneven", name) for name in OPTIONS)]
)
def test_every_chunk_is_the_rows_of_one_prefill(head_map, name, kind, poisoned_memory):
    each = MAPS[head_map] if head_map == "one row per sample" else None
    module = layer(
        head_map=HeadMap.gqa(HEADS, 3) if each else MAPS[head_map],
        **OPTIONS[name],
    )
    x = tokens()
    expected = module(x, head_map=each)
    cache = cache_for(module, kind)
    chunks = [module(chunk, cache=cache, head_map=each) for chunk in x.split(CHUNKS, 1)]
    torch.testing.assert_close(torch.cat(chunks, 1), expected)
    assert cache.host_lengths == [TOKENS] * BATCH


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_ragged_sequences_are_each_their_own(name, kind, poisoned_memory):
    """Padding comes first; every sequence gives what it gives alone."""
    module = layer(head_map=MAPS["uneven"], **OPTIONS[name])
    x = tokens()
    cache = cache_for(module, kind, page_size=4)
    outs, used = [[] for _ in range(BATCH)], [0] * BATCH
    for width, counts in ((20, (20, 3, 11)), (4, (0, 4, 1)), (1, (1, 1, 1)), (18, (2, 18, 0))):
        chunk = torch.full((BATCH, width, EMBED), 99.0).double()
        for b, count in enumerate(counts):
            chunk[b, width - count :] = x[b, used[b] : used[b] + count]
        out = module(chunk, cache=cache, counts=counts)
        assert out.isfinite().all()
        for b, count in enumerate(counts):
            outs[b].append(out[b, width - count :])
            used[b] += count
    assert cache.host_lengths == used
    for b in range(BATCH):
        torch.testing.assert_close(torch.cat(outs[b]), module(x[b : b + 1, : used[b]])[0])


def test_a_fork_goes_on_in_two_ways():
    module = layer(num_kv_heads=2, **OPTIONS["norms"])
    x = tokens(30, batch=1)
    cache = PagedCache(module.cache_rows, 8, 8, dtype=torch.float64)
    origin = cache.allocate()
    module(x[:, :21], cache=cache.batch([origin]))
    both = cache.batch([origin, cache.fork(origin)])
    ends = torch.cat([x[:, 21:], x[:, 21:].flip(1)])
    out = module(ends, cache=both)
    whole = torch.cat([x[:, :21].expand(2, -1, -1), ends], 1)
    torch.testing.assert_close(out, module(whole)[:, 21:])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_were_cropped_never_happened(kind):
    module = layer(num_kv_heads=3, **OPTIONS["rotary"])
    x = tokens(12)
    cache = cache_for(module, kind)
    module(x[:, :9], cache=cache)
    module(torch.full_like(x[:, :3], torch.nan), cache=cache)
    if kind == "static":
        cache.crop(9)
    else:
        for sequence in cache.sequences:
            cache.cache.crop(sequence, 9)
    torch.testing.assert_close(module(x[:, 9:], cache=cache), module(x)[:, 9:])


def test_positions_and_bias_can_be_given():
    module = layer(num_kv_heads=2, rotary=RotaryEmbedding(4))
    x = tokens(8)
    bias = torch.randn(BATCH, 1, 8, 8).double()
    positions = torch.arange(8) * 3
    expected = module(x, positions=positions, bias=bias)
    cache = cache_for(module, "static")
    module(x[:, :5], cache=cache, positions=positions[:5])
    out = module(x[:, 5:], cache=cache, positions=positions[5:], bias=bias[:, :, 5:])
    torch.testing.assert_close(out, expected[:, 5:])


def test_a_layer_under_autocast_fills_a_cache_of_that_type():
    module = layer(num_kv_heads=2).float()
    cache = StaticCache(module.cache_rows, BATCH, TOKENS, dtype=torch.bfloat16)
    x = tokens(6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.cat([module(chunk, cache=cache) for chunk in x.split(2, 1)], 1)
        torch.testing.assert_close(out, module(x), rtol=0.05, atol=0.05)


def test_gradients_are_refused_or_exact():
    module = layer(num_kv_heads=2)
    x = tokens(4)
    cache = cache_for(module, "static")
    with torch.enable_grad(), pytest.raises(UnsupportedError, match="carry a gradient.*no_grad"):
        module(x, cache=cache)
    assert cache.longest == 0
    module.k_proj.requires_grad_(False)
    module.v_proj.requires_grad_(False)
    with torch.enable_grad():
        expected = torch.autograd.grad(module(x).square().sum(), module.q_proj.weight)
        actual = torch.autograd.grad(module(x, cache=cache).square().sum(), module.q_proj.weight)
    torch.testing.assert_close(actual, expected)


def test_what_is_refused():
    module = layer(num_kv_heads=2)
    x = tokens(4)
    cache = cache_for(module, "static", capacity=5)
    for options, kind, message in (
        ({"cache": object()}, TypeError, "cache is a object; pass a StaticCache"),
        ({"counts": [1, 2, 3]}, ValueError, "pass cache= too"),
        ({"cache": cache, "context": x}, ValueError, "context cannot be passed with a cache"),
        (
            {"cache": cache, "key_lengths": torch.tensor([1, 1, 1])},
            ValueError,
            "key_lengths cannot be passed",
        ),
        ({"cache": cache, "counts": [5, 0, 0]}, ValueError, "from 0 to 4"),
        ({"cache": cache_for(module, "static", batch=2)}, ValueError, "key has shape"),
        ({"cache": cache_for(layer(num_kv_heads=3), "static")}, ValueError, "key has shape"),
    ):
        with pytest.raises(kind, match=message):
            module(x, **options)
    with pytest.raises(ValueError, match="causal=True"):
        both_ways = GroupedQueryAttention(EMBED, HEADS).double()
        both_ways(x, cache=cache_for(both_ways, "static"))
    module(x, cache=cache)
    with pytest.raises(CacheFullError):
        module(x, cache=cache)
    torch.testing.assert_close(
        module(x[:, :1], cache=cache), module(torch.cat([x, x[:, :1]], 1))[:, -1:]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_selected_values(kind):
    x = torch.randn(BATCH, 20, EMBED).double()
    module = layer(top_values=3, num_kv_heads=2)
    cache = cache_for(module, kind)
    with torch.no_grad():
        prompt = module(x[:, :18], cache=cache)
        torch.testing.assert_close(prompt, module(x[:, :18]))
        few = module(x[:, 18:], cache=cache)
        module.top_values = 20
        assert not torch.allclose(few, module(x)[:, 18:])
        again = cache_for(module, kind)
        module(x[:, :18], cache=again)
        torch.testing.assert_close(module(x[:, 18:], cache=again), module(x)[:, 18:])


def test_top_values_that_are_refused():
    with pytest.raises(ValueError, match="top_values is 0; pass at least 1"):
        layer(top_values=0)
