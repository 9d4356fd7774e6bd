from dataclasses import replace

import pytest
import torch
from einops import rearrange

from efficient_attn.convert.mla import (
    CompressOptions,
    calibrate,
    compress,
    frequency_transforms,
    lossless_rank,
    rorope,
)
from efficient_attn.convert.mla.compress import balance, harms, start, unturned_part
from efficient_attn.convert.mla.readers import Readers, Reading
from efficient_attn.convert.mla.rotation import choose, choose_on_grid, components
from tests.convert.mla.layers import FAMILIES, layer
from tests.convert.mla.oracle import (
    grouped_output,
    heads_of,
    latent_output,
    project,
    softmax,
    turn_neighbours,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
PLAIN = CompressOptions(refit=False, refine=0, shrink=False)


def inputs(source, batch=4, tokens=40):
    generator = torch.Generator().manual_seed(1)
    width = source.query.shape[1]
    x = torch.randn(batch, tokens, width, dtype=torch.float64, generator=generator)
    return x * torch.linspace(0.2, 1.5, width) + torch.linspace(-1, 1, width)


def moments_of(source):
    return calibrate(source, [inputs(source)])


def assert_same(source, made, tolerance=1e-10):
    x = inputs(source)[0]
    expected = grouped_output(source, x)
    error = (latent_output(made, x) - expected).abs().max()
    assert error < tolerance * expected.abs().max()


def output_error(source, made):
    x = inputs(source)
    return sum(float((latent_output(made, r) - grouped_output(source, r)).norm()) for r in x)


@every_family
@pytest.mark.parametrize("options", [CompressOptions(), PLAIN, CompressOptions(damping=0.1)])
def test_nothing_is_lost_at_the_full_budget(family, options):
    source = layer(**FAMILIES[family])
    turned = 2 * len(source.inverse_frequencies) * source.num_kv_heads
    rank = lossless_rank(source, turned)
    made = compress(source, moments_of(source), kv_lora_rank=rank, rope_dim=turned, options=options)
    assert_same(source, made.weights)
    assert abs(made.key_error) + abs(made.value_error) < 1e-9


@every_family
@pytest.mark.parametrize("rotation", ["real", "unitary", "query-aware"])
def test_rotations_fitted_to_data_lose_nothing(family, rotation):
    source = layer(**FAMILIES[family])
    transforms = frequency_transforms(source, moments_of(source), rotation)
    assert_same(source, rorope(source, transforms))


@every_family
def test_reading_the_latent_equals_expanding_it(family):
    source = layer(**FAMILIES[family])
    made = compress(source, moments_of(source), kv_lora_rank=6, rope_dim=2).weights
    x = inputs(source)[0]
    expanded, absorbed = latent_output(made, x), latent_output(made, x, absorbed=True)
    assert (expanded - absorbed).abs().max() < 1e-10 * expanded.abs().max()


def output_with_part_turned(source, part, x):
    """What the source computes if keys without ``part`` are not turned: the definition."""
    query, key, value = (heads_of(source, x, name) for name in ("query", "key", "value"))
    share = source.num_heads // source.num_kv_heads
    keys = rearrange(key, "h n d -> n (h d)")

    def per_head(rows):
        rows = rearrange(rows, "n (h d) -> h n d", h=source.num_kv_heads)
        return rows.repeat_interleave(share, 0)

    def read(head):
        of_head = part.query_rows.view(-1, source.num_kv_heads, source.head_dim)
        return of_head[:, head // share].mT

    rest = per_head(keys @ unturned_part(part, keys.shape[1]).mT)
    turned = turn_neighbours(keys @ part.rows.mT, part.frequencies)
    score = query @ rest.mT
    for head in range(source.num_heads):
        asked = turn_neighbours(query[head] @ read(head), part.frequencies)
        score[head] += asked @ turned.mT
    out = softmax(source.scale * score, source.window) @ value.repeat_interleave(share, 0)
    return project(rearrange(out, "h n d -> n (h d)"), source.output, source.output_bias)


PAPER = (CompressOptions.paper(fold=1), CompressOptions.paper(fold=2))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "half turned"])
@pytest.mark.parametrize("options", [PLAIN, replace(PLAIN, center=False), *PAPER])
def test_at_full_rank_only_turning_is_lost(family, options):
    # Narrower than its keys and values, unless norms make those more than linear in the input.
    source = layer(width=60 if family == "qwen3" else 20, **FAMILIES[family])
    moments = moments_of(source)
    rope_dim = 2 * len(source.inverse_frequencies) // options.fold
    found = components(source, moments, options.rotation, options.fold)
    if options.selection == "grid":
        part = choose_on_grid(source, found, rope_dim)
    else:
        part = choose(source, moments, found, rope_dim // 2)
    rank = lossless_rank(source, rope_dim)
    made = compress(source, moments, kv_lora_rank=rank, rope_dim=rope_dim, options=options)
    x = inputs(source)[0]
    expected = output_with_part_turned(source, part, x)
    assert (latent_output(made.weights, x) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_the_published_choice_is_a_grid_of_leading_components():
    source = layer(groups=2, heads=2)
    moments = moments_of(source)
    found = components(source, moments, "real", fold=2)
    part = choose_on_grid(source, found, 4)
    expected = source.inverse_frequencies[[0, 2]]
    assert torch.equal(part.frequencies, expected)
    # Each is the leading direction of its group of two frequencies and two heads.
    keys = moments.second[:16, :16]
    for pair in range(2):
        captured = sum(row @ keys @ row for row in part.rows[2 * pair : 2 * pair + 2])
        channels = torch.arange(16).view(2, 2, 4)[:, :, 2 * pair : 2 * pair + 2]
        real, imaginary = channels[:, 0].flatten(), channels[:, 1].flatten()
        local = keys[real][:, real] + keys[imaginary][:, imaginary]
        torch.testing.assert_close(captured, torch.linalg.eigvalsh(local)[-1])


def test_frequencies_that_are_equal_may_be_folded():
    given = torch.tensor([0.7, 0.7, 0.1, 0.1], dtype=torch.float64)
    source = layer(inverse_frequencies=given)
    moments = moments_of(source)
    for rotation in ("real", "unitary", "query-aware"):
        options = replace(PLAIN, rotation=rotation, fold=2)
        made = compress(source, moments, kv_lora_rank=20, rope_dim=24, options=options)
        assert_same(source, made.weights)
    apart = layer(inverse_frequencies=torch.tensor([0.7, 0.4, 0.1, 0.1], dtype=torch.float64))
    made = compress(apart, moments_of(apart), kv_lora_rank=20, rope_dim=24, options=options)
    with pytest.raises(AssertionError):
        assert_same(apart, made.weights, 1e-3)


def test_the_balance_is_the_ratio_of_sizes_and_vanishes_at_full_rank():
    source = layer()
    moments = moments_of(source)
    part = choose(source, moments, components(source, moments, "real"), 2)
    keys, values = (
        rearrange(heads_of(source, inputs(source).flatten(0, 1), name), "h n d -> n (h d)")
        for name in ("key", "value")
    )
    left = keys @ unturned_part(part, keys.shape[1]).mT
    expected = left.square().sum(-1).mean().sqrt() / values.square().sum(-1).mean().sqrt()
    assert balance(source, moments, part) == pytest.approx(float(expected))
    x = inputs(source)[0]
    plain, balanced = (
        latent_output(
            compress(source, moments, kv_lora_rank=20, rope_dim=4, options=options).weights, x
        )
        for options in (replace(PLAIN, metric=metric) for metric in ("plain", "balanced"))
    )
    torch.testing.assert_close(plain, balanced)


def reading_of(source, options=PLAIN, rank=8, rope_dim=4):
    moments = moments_of(source)
    found = components(source, moments, options.rotation, options.fold)
    part = choose(source, moments, found, rope_dim // 2)
    reading = Reading(
        source,
        moments,
        rank,
        part.frequencies,
        *harms(source, moments, part, options),
        center_keys=options.center,
        center_values=options.center,
    )
    down, readers = start(source, reading, part, rank, options)
    return reading, down, readers


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "half turned", "yarn"])
def test_the_expected_error_is_that_of_independent_queries_keys_and_distances(family, center):
    source = layer(**FAMILIES[family])
    options = replace(PLAIN, center=center)
    moments = moments_of(source)
    reading, down, readers = reading_of(source, options)
    rows = [heads_of(source, inputs(source).flatten(0, 1), name) for name in ("key", "value")]
    y = torch.cat([rearrange(each, "h n d -> n (h d)") for each in rows], -1)
    speeds = reading._of_cache.left.frequencies
    keys = values = 0.0
    shares = moments.distances.shares
    every = torch.arange(shares.shape[1])[:, None]
    for head in range(source.num_heads):
        key = y @ reading.keys[head].mT
        cached = y @ down.mT
        errors = []
        for n in every:
            angle = -n * source.inverse_frequencies
            turned_key = turn_at(key, angle, "halves")
            rope = turn_at(cached[:, 8:], -n * speeds, "neighbours")
            errors.append(turned_key - torch.cat((cached[:, :8], rope), -1) @ readers.key[head].mT)
        weight = (shares[head] / len(y))[:, None].expand(-1, len(y)).flatten()
        error = torch.cat(errors)
        error = error - weight @ error if center else error
        keys += float((error @ reading.key_harm[head] * error).sum(-1) @ weight)
        # A constant error of values goes to the output's bias, or at least that of their biases.
        known = y.mean(0) if center else reading.bias
        error = (y - known) @ (reading.values[head] - readers.value[head] @ down[:8]).mT
        values += float((error @ reading.value_harm[head] * error).sum(-1).mean())
    assert reading.errors(down, readers) == pytest.approx((keys, values))


def turn_at(rows, angle, layout):
    phase = torch.exp(1j * angle)
    if layout == "neighbours":
        z = torch.complex(rows[:, 0::2], rows[:, 1::2]) * phase
        return torch.view_as_real(z).flatten(-2)
    pairs = len(angle)
    z = torch.complex(rows[:, :pairs], rows[:, pairs : 2 * pairs]) * phase
    return torch.cat((z.real, z.imag, rows[:, 2 * pairs :]), -1)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "yarn, half turned"])
def test_each_regression_finds_the_least_error(family, center):
    """A step in any direction from where a regression ends makes the error larger."""
    reading, down, readers = reading_of(layer(**FAMILIES[family]), replace(PLAIN, center=center))
    before = sum(reading.errors(down, readers))
    better = reading.improve_readers(down, readers)
    after = sum(reading.errors(down, better))
    assert after < before
    for _ in range(5):
        key, value = (torch.randn_like(x) * 1e-3 for x in (better.key, better.value))
        other = Readers(better.key + key, better.value + value)
        assert sum(reading.errors(down, other)) > after
    improved = reading.improve_cache(down, better)
    least = sum(reading.errors(improved, better))
    assert least < after
    for _ in range(5):
        other = improved + torch.randn_like(improved) * 1e-3
        assert sum(reading.errors(other, better)) > least


def test_more_numbers_and_more_rounds_never_cost():
    source = layer(**FAMILIES["qwen2"])
    moments = moments_of(source)

    def error(rank, refine):
        options = CompressOptions(refine=refine)
        made = compress(source, moments, kv_lora_rank=rank, rope_dim=4, options=options)
        return made.key_error + made.value_error

    by_rank = [error(rank, 0) for rank in (2, 4, 8, 12, 16, 20)]
    assert by_rank == sorted(by_rank, reverse=True)
    by_rounds = [error(6, rounds) for rounds in (0, 1, 2, 4)]
    assert by_rounds == sorted(by_rounds, reverse=True)
    assert by_rounds[0] > by_rounds[-1]


def test_leaving_means_out_never_costs():
    """Under the error that a softmax sees, means of keys are free, and so are those of values."""
    source = layer()
    found = {}
    for center in (True, False):
        options = replace(PLAIN, shrink=True, center=center)
        _, down, readers = reading_of(source, options, rank=7, rope_dim=0)
        judge, _, _ = reading_of(source, replace(options, center=True), rank=7, rope_dim=0)
        found[center] = sum(judge.errors(down, readers))
    assert found[True] < found[False]


def test_the_error_of_principal_components_is_the_tail_of_eigenvalues():
    """With nothing turned in the source, what a rank leaves is what its eigenvalues tell."""
    source = layer(inverse_frequencies=torch.zeros(0, dtype=torch.float64))
    moments = moments_of(source)
    options = replace(PLAIN, metric="plain", center=False)
    reading, _, _ = reading_of(source, options, rank=5, rope_dim=0)
    share = source.num_heads // source.num_kv_heads
    values = torch.linalg.eigvalsh(moments.second) * share
    made = compress(source, moments, kv_lora_rank=5, rope_dim=0, options=options)
    assert made.key_error + made.value_error == pytest.approx(float(values[:-5].sum()))


def test_what_is_the_same_for_all_keys_of_a_query_changes_nothing():
    source = layer(**FAMILIES["qwen2"])
    made = compress(source, moments_of(source), kv_lora_rank=8, rope_dim=4).weights
    x = inputs(source)[0]
    expected = latent_output(made, x)
    shift = torch.randn(8, dtype=torch.float64)
    up = made.latent_up.view(made.num_heads, -1, 8)[:, made.qk_nope_head_dim :]
    bias = (
        torch.zeros(12, dtype=torch.float64)
        if made.latent_down_bias is None
        else made.latent_down_bias
    )
    back = made.output @ (up @ shift).flatten()
    other = replace(
        made,
        latent_down_bias=bias + torch.nn.functional.pad(shift, (0, 4)),
        output_bias=made.output_bias - back,
    )
    assert (latent_output(other, x) - expected).abs().max() < 1e-12
