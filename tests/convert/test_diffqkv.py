"""Merging key heads: exact where it can be, never worse than the mean where it cannot."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.diffqkv import MERGES, separate_heads
from efficient_attn.convert.gqa import InputMoments
from efficient_attn.errors import ConversionError

HEADS, KEY_HEADS, DIM, EMBED, TOKENS = 8, 4, 6, 20, 11


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def source(bias=False, pairs=3, seed=0):
    biases = {}
    if bias:
        biases = {
            "query_bias": random(HEADS * DIM, seed=seed + 10),
            "key_bias": random(KEY_HEADS * DIM, seed=seed + 20),
            "value_bias": random(KEY_HEADS * DIM, seed=seed + 30),
        }
    return GroupedAttentionWeights(
        query=random(HEADS * DIM, EMBED, seed=seed + 40),
        key=random(KEY_HEADS * DIM, EMBED, seed=seed + 50),
        value=random(KEY_HEADS * DIM, EMBED, seed=seed + 60),
        output=random(EMBED, HEADS * DIM, seed=seed + 70),
        num_heads=HEADS,
        num_kv_heads=KEY_HEADS,
        scale=0.1,
        inverse_frequencies=torch.tensor([1.0, 0.3, 0.05])[:pairs].double(),
        **biases,
    )


def with_bias_column(matrix, bias):
    column = matrix.new_zeros(len(matrix), 1) if bias is None else bias[:, None]
    return torch.cat((matrix, column), 1)


def without_bias_column(rows, bias):
    return rows[:, :-1], None if bias is None else rows[:, -1]


def multiples(layer):
    """``layer`` with every second key head a complex multiple of the one before it."""
    pairs = len(layer.inverse_frequencies)
    key = with_bias_column(layer.key, layer.key_bias).view(KEY_HEADS, DIM, -1).clone()
    z = torch.complex(key[:, :pairs], key[:, pairs : 2 * pairs])
    factor = torch.complex(random(2, pairs, 1), random(2, pairs, 1, seed=1))
    z[1::2] = factor * z[::2]
    key[:, :pairs], key[:, pairs : 2 * pairs] = z.real, z.imag
    rest = DIM - 2 * pairs
    key[1::2, 2 * pairs :] = random(2, rest, rest) @ key[::2, 2 * pairs :]
    key, bias = without_bias_column(key.flatten(0, 1), layer.key_bias)
    return dataclasses.replace(layer, key=key, key_bias=bias)


def heads_of(matrix, bias, x, count):
    rows = with_bias_column(matrix, bias)
    projected = torch.cat((x, x.new_ones(len(x), 1)), 1) @ rows.T
    return projected.unflatten(-1, (count, -1)).transpose(0, 1)


def turn(heads, frequencies):
    pairs = len(frequencies)
    angles = torch.arange(heads.shape[1])[:, None] * frequencies
    z = torch.complex(heads[..., :pairs], heads[..., pairs : 2 * pairs])
    z = z * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag, heads[..., 2 * pairs :]), -1)


def scores(weights, x, frequencies):
    key_heads = len(weights.key) // DIM
    q = turn(heads_of(weights.query, weights.query_bias, x, HEADS), frequencies)
    k = turn(heads_of(weights.key, weights.key_bias, x, key_heads), frequencies)
    return q @ k.repeat_interleave(HEADS // key_heads, 0).mT


def contributions(weights, x):
    """What each query head would add to the output, were its attention on one token."""
    count = len(weights.value) // DIM
    v = heads_of(weights.value, weights.value_bias, x, count)
    out = weights.output.unflatten(1, (HEADS, DIM)).transpose(0, 1)
    return v.repeat_interleave(HEADS // count, 0) @ out.mT


def inputs(count=TOKENS, seed=3):
    return random(count, EMBED, seed=seed) @ random(EMBED, EMBED, seed=seed + 1)


def moments_of(x):
    found = InputMoments(EMBED)
    found.add(x)
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pairs", [3, 2, 1])
@pytest.mark.parametrize("calibrated", [False, True])
def test_multiples_of_one_head_merge_exactly(bias, pairs, calibrated):
    layer, x = multiples(source(bias, pairs)), inputs()
    moments = moments_of(inputs(200, seed=5)) if calibrated else None
    merged = separate_heads(layer, 2, moments=moments)
    assert merged.key_error < 1e-9 and merged.value_error == 0
    frequencies = layer.inverse_frequencies
    before = scores(layer, x, frequencies)
    near = 1e-6 * before.abs().max().item()
    torch.testing.assert_close(scores(merged, x, frequencies), before, rtol=0, atol=near)
    mean = separate_heads(layer, 2, merge="mean")
    assert (scores(mean, x, frequencies) - before).abs().max() > 1e3 * near


def score_error(layer, merged, x):
    """Mean square of the change of all scores, over every distance that pairs may turn by.

    Queries and keys are those of any two tokens, and angles of pairs are uniform: then errors of
    different pairs are independent, and that of one is half of the product of two mean squares.
    """

    def heads(weights, name, count):
        rows = heads_of(getattr(weights, name), getattr(weights, f"{name}_bias"), x, count)
        return torch.complex(rows[..., :3], rows[..., 3:])

    query, changed = heads(layer, "query", HEADS), heads(merged, "query", HEADS)
    each = HEADS // KEY_HEADS, HEADS // merged.num_key_heads
    key = heads(layer, "key", KEY_HEADS).repeat_interleave(each[0], 0)
    shared = heads(merged, "key", merged.num_key_heads).repeat_interleave(each[1], 0)
    # The factor that a query was given is its conjugate on the key.
    factor = (changed / query).conj()
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))
    error = (key - factor[:, :1] * shared).abs().square().mean(1)
    return float((query.abs().square().mean(1) * error).sum())


@pytest.mark.parametrize("key_heads", [1, 2])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), bias=st.booleans())
def test_on_calibration_tokens_nothing_loses_less_than_the_svd(key_heads, seed, bias):
    layer, x = source(bias, seed=seed), inputs(60, seed=seed)
    errors, told = {}, {}
    for merge in MERGES:
        merged = separate_heads(layer, key_heads, merge=merge, moments=moments_of(x))
        errors[merge], told[merge] = score_error(layer, merged, x), merged.key_error
    assert errors["complex_svd"] <= min(errors.values()) * (1 + 1e-4)
    assert errors["select"] <= score_error(layer, first_of(layer, key_heads), x) * (1 + 1e-4)
    # What is told of a layer is that, up to what its scores amount to.
    ratios = [errors[merge] / told[merge] for merge in MERGES]
    assert max(ratios) <= min(ratios) * (1 + 1e-3)


def first_of(layer, key_heads):
    merged = separate_heads(layer, key_heads, merge="select")
    heads = layer.key.view(key_heads, -1, DIM, EMBED)[:, 0].flatten(0, 1)
    if layer.key_bias is None:
        return dataclasses.replace(merged, key=heads)
    bias = layer.key_bias.view(key_heads, -1, DIM)[:, 0].flatten()
    return dataclasses.replace(merged, key=heads, key_bias=bias)


def test_the_head_that_is_asked_for_is_selected():
    layer = source()
    query = layer.query.view(KEY_HEADS, -1, EMBED).clone()
    query[1], query[2] = 0, 0
    layer = dataclasses.replace(layer, query=query.flatten(0, 1))
    merged = separate_heads(layer, 2, merge="select")
    keys = layer.key.view(KEY_HEADS, DIM, EMBED)
    assert torch.equal(merged.query, layer.query)
    assert torch.equal(merged.key.view(2, DIM, EMBED), keys[[0, 3]])


@pytest.mark.parametrize("merge", MERGES)
def test_as_many_heads_leave_every_bit(merge):
    layer = source(bias=True)
    merged = separate_heads(layer, KEY_HEADS, KEY_HEADS, merge=merge)
    for name in ("query", "key", "value", "output", "query_bias", "key_bias", "value_bias"):
        assert torch.equal(getattr(merged, name), getattr(layer, name)), name


@pytest.mark.parametrize("bias", [False, True])
def test_values_that_are_images_of_one_head_pool_exactly(bias):
    layer = source(bias)
    rows = with_bias_column(layer.value, layer.value_bias).view(KEY_HEADS, DIM, -1).clone()
    rows[1::2] = random(2, DIM, DIM) @ rows[::2]
    value, value_bias = without_bias_column(rows.flatten(0, 1), layer.value_bias)
    layer = dataclasses.replace(layer, value=value, value_bias=value_bias)
    pooled = separate_heads(layer, 2, 2, moments=moments_of(inputs(200)))
    assert pooled.value_error < 1e-9
    assert pooled.value.shape == (2 * DIM, EMBED)
    x = inputs()
    before = contributions(layer, x)
    near = 1e-6 * before.abs().max().item()
    torch.testing.assert_close(contributions(pooled, x), before, rtol=0, atol=near)


def test_pooled_values_err_less_than_their_mean():
    layer, x = source(), inputs(300)
    pooled = separate_heads(layer, KEY_HEADS, 2, moments=moments_of(x))
    assert pooled.key is layer.key and pooled.key_error == 0
    mean = layer.value.view(2, 2, DIM, EMBED).mean(1).flatten(0, 1)
    averaged = dataclasses.replace(pooled, value=mean, output=layer.output)
    expected = contributions(layer, x)
    ours, theirs = ((contributions(w, x) - expected).square().sum() for w in (pooled, averaged))
    assert ours < 0.9 * theirs


def test_weights_in_half_precision_are_rounded_once():
    """What is written in a wider dtype is not that of the source, rounded before."""
    layer = source()
    half = {name: getattr(layer, name).half() for name in ("query", "key", "value", "output")}
    merged = separate_heads(dataclasses.replace(layer, **half), 2, 2)
    assert {x.dtype for x in (merged.query, merged.key, merged.value, merged.output)} == {
        torch.float64
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_key_heads": 3}, "3 key heads asked for.*divisor of 4"),
        ({"num_key_heads": 0}, "0 key heads asked for.*divisor of 4"),
        ({"num_key_heads": 2, "num_value_heads": 3}, "3 value heads asked for.*divisor of 4"),
        ({"num_key_heads": 2, "merge": "median"}, "complex_svd"),
    ],
)
def test_what_cannot_be_merged_is_refused(options, message):
    with pytest.raises(ConversionError, match=message):
        separate_heads(source(), **options)


def test_normalised_heads_can_only_be_selected():
    layer = dataclasses.replace(source(), key_norm=torch.ones(DIM), query_norm=torch.ones(DIM))
    for merge, count in itertools.product(("mean", "complex_svd"), (1, 2)):
        with pytest.raises(ConversionError, match="select"):
            separate_heads(layer, count, merge=merge)
    assert separate_heads(layer, 2, merge="select").num_key_heads == 2
