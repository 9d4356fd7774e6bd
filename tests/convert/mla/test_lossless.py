from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_attn.convert.mla import exact, factorise, rorope
from efficient_attn.convert.mla.lossless import spread_over_frequencies
from efficient_attn.convert.mla.pairs import pairs_of, rows_of_pairs
from tests.convert.mla.layers import FAMILIES, layer
from tests.convert.mla.oracle import grouped_output, latent_output

every_family = pytest.mark.parametrize("family", FAMILIES)


def random_transforms(source, kind):
    shape = (pairs_of(source), source.num_kv_heads, source.num_kv_heads)
    found = torch.view_as_complex(torch.randn(*shape, 2, dtype=torch.float64))
    if kind == "real":
        return torch.linalg.qr(found.real)[0]
    if kind == "unitary":
        return torch.linalg.qr(found)[0]
    return found + 2 * torch.eye(shape[-1])


def assert_same(source, made, tolerance=1e-12, tokens=40):
    x = torch.randn(tokens, source.query.shape[1], dtype=torch.float64)
    expected = grouped_output(source, x)
    scale = expected.abs().max()
    assert (latent_output(made, x) - expected).abs().max() < tolerance * scale
    assert (latent_output(made, x, absorbed=True) - expected).abs().max() < tolerance * scale


@every_family
@pytest.mark.parametrize("factor", ["selector", "svd", "random-orthogonal"])
def test_exact_changes_nothing(family, factor):
    source = layer(**FAMILIES[family])
    assert_same(source, exact(source, factor))


def expanded(made):
    """A factored layer as one with a key and a value head for each query head."""
    latents = made.latents
    changed = {"num_kv_heads": latents.num_heads}
    for name, up in (("key", made.key_up), ("value", made.value_up)):
        bias = getattr(latents, f"{name}_bias")
        changed[name] = up @ getattr(latents, name)
        changed[f"{name}_bias"] = None if bias is None else up @ bias
    return replace(latents, **changed)


@every_family
@pytest.mark.parametrize("factor", ["svd", "random-orthogonal"])
def test_factors_before_turning_change_nothing(family, factor):
    source = layer(**FAMILIES[family])
    made = factorise(source, factor)
    assert made.latents.key.shape == source.key.shape
    x = torch.randn(20, source.query.shape[1], dtype=torch.float64)
    expected = grouped_output(source, x)
    error = (grouped_output(expanded(made), x) - expected).abs().max()
    assert error < 1e-12 * expected.abs().max()


def test_singular_factors_share_the_size_of_the_projection():
    source = layer(width=40)
    assert factorise(source).key_up is None
    made = factorise(source, "svd")
    down, up = made.latents.key, made.key_up
    torch.testing.assert_close(down @ down.mT, up.mT @ up)


@every_family
@pytest.mark.parametrize("kind", ["real", "unitary", "invertible"])
def test_mixing_heads_of_one_frequency_changes_nothing(family, kind):
    source = layer(**FAMILIES[family])
    assert_same(source, rorope(source, random_transforms(source, kind)), 1e-11)


@every_family
def test_as_many_numbers_are_cached(family):
    source = layer(**FAMILIES[family])
    for made in (exact(source), rorope(source, random_transforms(source, "unitary"))):
        cached = made.kv_lora_rank + made.qk_rope_head_dim
        assert cached == 2 * source.num_kv_heads * source.head_dim
        assert made.qk_rope_head_dim == 2 * len(made.inverse_frequencies)


def test_a_rank_beyond_the_width_is_not_cached():
    source = layer(groups=6, width=20)
    made = exact(source, "svd")
    assert made.kv_lora_rank == 20
    assert_same(source, made)


def test_a_factor_that_loses_values_is_noticed():
    source = layer()
    rows = source.value.shape[0]
    half = torch.eye(rows, dtype=torch.float64)[: rows // 2]
    with pytest.raises(AssertionError):
        assert_same(source, rorope(source, value_factor=(half.mT, half)))


@pytest.mark.parametrize("mistake", ["imaginary rows differ", "frequencies mix"])
def test_a_wrong_rotation_is_noticed(mistake, monkeypatch):
    """The tests above can fail: what does not commute with turning is no rotation of ours."""
    source = layer()
    transforms = random_transforms(source, "real")
    assert_same(source, rorope(source, transforms))

    def wrong_rows(mix, dim):
        rows = rows_of_pairs(mix, dim)
        if mistake == "imaginary rows differ":
            other = rows_of_pairs(spread_over_frequencies(turned_heads(transforms)), dim)
            rows[1::2] = other[1::2]
        else:
            angle = torch.tensor(1e-4, dtype=torch.float64)
            rows[0:2], rows[-2:] = (
                angle.cos() * rows[0:2] + angle.sin() * rows[-2:],
                angle.cos() * rows[-2:] - angle.sin() * rows[0:2],
            )
        return rows

    def turned_heads(given):
        turn = torch.linalg.qr(torch.randn_like(given[0]))[0]
        return (given @ turn).to(torch.complex128)

    monkeypatch.setattr("efficient_attn.convert.mla.lossless.rows_of_pairs", wrong_rows)
    with pytest.raises(AssertionError):
        assert_same(source, rorope(source, transforms), 1e-7)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 4),
    share=st.integers(1, 3),
    pairs=st.integers(1, 4),
    unturned=st.integers(0, 3),
    width=st.integers(1, 24),
    biases=st.sets(st.sampled_from(["query", "key", "value", "output"])),
    norms=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(groups, share, pairs, unturned, width, biases, norms, seed):
    torch.manual_seed(seed)
    source = layer(
        heads=groups * share,
        groups=groups,
        dim=2 * pairs + unturned,
        width=width,
        biases=sorted(biases),
        norms=norms,
        inverse_frequencies=torch.rand(pairs, dtype=torch.float64),
    )
    assert_same(source, rorope(source, random_transforms(source, "unitary")), tokens=7)
    assert_same(source, exact(source, "svd"), 1e-11, tokens=7)


def test_the_same_seed_gives_the_same_bytes():
    source = layer()
    first, again, other = (exact(source, "random-orthogonal", seed=s) for s in (3, 3, 4))
    assert torch.equal(first.latent_down, again.latent_down)
    assert not torch.equal(first.latent_down, other.latent_down)


def test_wrong_transforms_are_refused():
    with pytest.raises(ValueError, match=r"takes \(4, 3, 3\)"):
        rorope(layer(), torch.eye(3))
    with pytest.raises(ValueError, match="selector, svd, random-orthogonal"):
        exact(layer(), "lu")
