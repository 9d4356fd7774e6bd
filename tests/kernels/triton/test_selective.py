"""Attention with selected values: the kernels against the reference, and what they read."""

import pytest
import torch

from efficient_attn import reference
from efficient_attn.head_map import HeadMap
from efficient_attn.kernels.triton import selective
from efficient_attn.testing import assert_accurate, head_maps
from tests.cached_inputs import LENGTHS, in_pages
from tests.kernels.triton.cached import assert_close, assert_same, cached
from tests.kernels.triton.oracle import DEVICE

MAPS = head_maps(batch=len(LENGTHS))
GROUPS = HeadMap.from_group_sizes([0, 3, 1])


def run(query, key, value, lengths, table=None, head_map=None, **options):
    """The kernels, with the options of the reference, as (out, lse, dropped mass)."""
    maps = (None, None) if head_map is None else (head_map.q_to_k, head_map.q_to_v)
    window = options.get("window")
    out, lse, kept = selective.decode(
        query, key, value, torch.tensor(lengths, device=DEVICE), table, *maps,
        None if window is None else window[0], options.get("scale", query.shape[-1] ** -0.5),
        options.get("softcap", 0.0), options.get("top_values"),
        options.get("max_dropped_mass", 0.0),
    )  # fmt: skip
    return out, lse, 1 - kept


def compare(query, key, value, lengths, head_map, floor=5e-6, **options):
    head_map = head_map.to(DEVICE)
    results = run(query, key, value, lengths, head_map=head_map, **options)
    options |= {"cache_lengths": torch.tensor(lengths, device=DEVICE), "head_map": head_map}
    options |= {"value_weights": "renormalised"}
    inputs = (query, key, value)
    truths = reference.selective_decode(*(x.double() for x in inputs), **options)
    plains = reference.selective_decode(*inputs, **options)
    for result, truth, plain in zip(results, truths, plains, strict=True):
        assert result.shape == truth.shape
        assert_accurate(result, truth, plain, floor=floor)
    return results


@pytest.mark.parametrize("name", ["keys apart from values", "one row per sample"])
def test_head_maps(name, poisoned_memory):
    out, *_ = compare(*cached(MAPS[name]), LENGTHS, MAPS[name], top_values=9)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (1, {"top_values": 1}),
        (2, {"top_values": 500}),
        (1, {"max_dropped_mass": 0.25}),
        (1, {"max_dropped_mass": 0.0}),
        (2, {"max_dropped_mass": 0.9, "softcap": 1.5}),
        (2, {"top_values": 4, "window": (33, 0), "softcap": 2.0, "scale": 0.7}),
        (2, {"top_values": 7, "scale": -0.3}),
    ],
    ids=str,
)
def test_options(tokens, options, poisoned_memory):
    compare(*cached(GROUPS, (5, 100), tokens, room=110), (5, 100), GROUPS, **options)


@pytest.mark.parametrize(("dims", "dtype"), [((40, 24), torch.bfloat16), ((64, 72), torch.float16)])
def test_half_precision(dims, dtype):
    # Few bits make scores equal that the truth tells apart, so all that come near are selected.
    inputs = cached(GROUPS, (70, 30), dims=dims, dtype=dtype)
    compare(*inputs, (70, 30), GROUPS, top_values=70, floor=4e-3)


@pytest.mark.parametrize(("page_size", "top_values"), [(64, 5), (24, 200)])
def test_pages(page_size, top_values, poisoned_memory):
    inputs = cached(HeadMap.diff(2, k=1, v=2))
    dense = run(*inputs, LENGTHS, top_values=top_values)
    table, *pools = in_pages(LENGTHS, page_size, *inputs[1:])
    assert_close(run(inputs[0], *pools, LENGTHS, table, top_values=top_values), dense)


@pytest.mark.parametrize("top_values", [3, 40])
def test_the_first_of_equal_scores(top_values):
    query = torch.ones(1, 2, 1, 16, device=DEVICE)
    key = torch.zeros(1, 1, 100, 16, device=DEVICE)
    key[..., 0] = torch.tensor([0.0, 1.0, -0.0, 2.0], device=DEVICE).repeat(25)
    value = torch.randn(1, 2, 100, 24, device=DEVICE)
    compare(query, key, value, (99,), HeadMap.diff(2, k=1, v=2), top_values=top_values)


def test_values_that_are_not_selected_are_not_read():
    head_map = HeadMap.gqa(4, 2)
    query, key, value = cached(head_map, (130,), room=140)
    expected = run(query, key, value, (130,), top_values=6)
    scores = torch.einsum("bkgid,bkjd->bkgj", query.unflatten(1, (2, 2)), key[:, :, :130])
    wanted = torch.zeros(1, 2, 140, dtype=torch.bool, device=DEVICE)
    wanted.scatter_(2, scores.topk(6).indices.flatten(2), True)
    value = value.masked_fill(~wanted.unsqueeze(-1), torch.nan)
    assert_same(run(query, key, value, (130,), top_values=6), expected)


def test_a_cached_nan_is_not_hidden():
    query, key, value = cached(HeadMap.mha(2), (40, 20))
    key[0, 1, 4, 3] = torch.nan
    for options in ({"top_values": 3}, {"max_dropped_mass": 0.5}):
        out, lse, _ = run(query, key, value, (40, 20), **options)
        assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
        assert out[1].isfinite().all() and out[0, 0].isfinite().all()


@pytest.mark.parametrize(("batch", "tokens", "room"), [(0, 1, 4), (2, 0, 4), (2, 1, 0)])
def test_sizes_of_zero(batch, tokens, room, poisoned_memory):
    inputs = cached(GROUPS, [0] * batch, tokens, room=room)
    out, lse, dropped = run(*inputs, [0] * batch, head_map=GROUPS.to(DEVICE), top_values=3)
    assert out.shape == (batch, 4, tokens, 24) and not out.any() and not dropped.any()
    assert (lse == -torch.inf).all()
