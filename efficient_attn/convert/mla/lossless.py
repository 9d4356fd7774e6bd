"""Grouped-query attention as MLA with as many cached numbers, and nothing lost.

All key heads side by side are one key whose frequencies repeat ``g`` times, all value heads one
latent (TransMLA, arXiv 2502.07864, version 1 and section "RoRoPE" of later versions). Any linear
map of the ``g`` pairs of one frequency commutes with their turning, and its inverse on the queries
undoes it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import (
    FactoredAttentionWeights,
    GroupedAttentionWeights,
    LatentAttentionWeights,
)
from efficient_attn.convert.mla.assemble import LatentMaps, assemble, head_selectors
from efficient_attn.convert.mla.pairs import key_heads_of, pairs_of, rows_of_pairs

# What :func:`exact` and :func:`factorise` make of the projections of keys and values.
Factor = Literal["selector", "svd", "random-orthogonal"]


def exact(
    weights: GroupedAttentionWeights, factor: Factor = "selector", *, seed: int = 0
) -> LatentAttentionWeights:
    """The same layer with its key and value weights factorised into down and up projections.

    A factor of keys has to commute with their turning to be absorbed into the queries, so it mixes
    the heads of one frequency only (:func:`factorise` lifts that); a factor of values is free.

    Args:
        weights: The layer.
        factor: ``"selector"`` copies each head. ``"svd"`` takes singular vectors of the weights,
            ``"random-orthogonal"`` random ones: starting points for further training.
        seed: Of the random factors.

    Source: TransMLA, version 1 (arXiv 2502.07864v1), section 3.
    """
    check_factor(factor)
    groups, pairs = weights.num_kv_heads, pairs_of(weights)
    if factor == "selector":
        return rorope(weights)
    if factor == "svd":
        key = weights.key.double().view(groups, weights.head_dim, -1)
        z = torch.complex(key[:, :pairs], key[:, pairs : 2 * pairs]).transpose(0, 1)
        left = torch.linalg.eigh(z @ z.mH)[1].flip(-1)
        u, s, _ = torch.linalg.svd(weights.value.double(), full_matrices=False)
        kept = s > s[0] * torch.finfo(torch.float64).eps * max(weights.value.shape)
        up = u[:, kept] * s[kept].sqrt()
        return rorope(weights, left.mH, value_factor=(up, u[:, kept].mT / s[kept].sqrt()[:, None]))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(pairs, groups, groups, 2, generator=generator, dtype=torch.float64)
    transforms = torch.linalg.qr(torch.view_as_complex(noise))[0]
    basis = random_orthogonal(generator, len(weights.value))
    return rorope(weights, transforms, value_factor=(basis, basis.mT))


def factorise(
    weights: GroupedAttentionWeights, factor: Factor = "selector", *, seed: int = 0
) -> FactoredAttentionWeights:
    """The same layer with down and up factors of keys and values, keys turned after the second.

    The factor of keys may mix everything with everything, so that training has more freedom at the
    same cache; but it cannot be absorbed into the queries, for it does not commute with turning.

    Args:
        weights: The layer.
        factor: ``"selector"``: the latents are the heads. ``"svd"``: singular vectors of the
            projections repeated for every query head, ``"random-orthogonal"``: random ones.
        seed: Of the random factors.

    Source: TransMLA, version 1 (arXiv 2502.07864v1), section 3.
    """
    check_factor(factor)
    if factor == "selector":
        return FactoredAttentionWeights(weights)
    generator = torch.Generator().manual_seed(seed)
    selectors = head_selectors(weights).flatten(0, 1)
    share = weights.num_heads / weights.num_kv_heads
    latents, ups = {}, []
    for name in ("key", "value"):
        matrix, bias = getattr(weights, name).double(), getattr(weights, f"{name}_bias")
        if factor == "svd":
            basis, size, _ = torch.linalg.svd(matrix)
            # A direction that no input reaches keeps its length.
            size = torch.nn.functional.pad(size, (0, len(basis) - len(size)))
            reached = size > size[0] * torch.finfo(size.dtype).eps * max(matrix.shape)
            size = torch.where(reached, size.sqrt() * share**-0.25, 1.0)
        else:
            basis, size = random_orthogonal(generator, len(matrix)), torch.ones(1).double()
        down = (basis / size).mT
        latents[name] = down @ matrix
        latents[f"{name}_bias"] = None if bias is None else down @ bias.double()
        ups.append(selectors @ (basis * size))
    return FactoredAttentionWeights(replace(weights, **latents), *ups)


def rorope(
    weights: GroupedAttentionWeights,
    transforms: Tensor | None = None,
    *,
    value_factor: tuple[Tensor, Tensor] | None = None,
) -> LatentAttentionWeights:
    """One rotary key for all heads, its pairs mixed among heads frequency by frequency.

    Channels that the source does not turn go to the latent, beside the values.

    Args:
        weights: The layer.
        transforms: ``(F, g, g)`` invertible matrices, real or complex, or None for identities;
            :func:`efficient_attn.convert.mla.frequency_transforms` fits them to data.
        value_factor: Up ``(g d, n)`` and down ``(n, g d)`` factors of values, whose product leaves
            every value of the layer as it is.

    Source: TransMLA (arXiv 2502.07864v3), section "RoRoPE"; complex and non-orthogonal transforms
        are ours.
    """
    groups, dim, pairs = weights.num_kv_heads, weights.head_dim, pairs_of(weights)
    if transforms is None:
        transforms = torch.eye(groups, dtype=torch.complex128).expand(pairs, -1, -1)
    if transforms.shape != (pairs, groups, groups):
        raise ValueError(
            f"transforms has shape {tuple(transforms.shape)}; a layer of {groups} key heads with "
            f"{pairs} rotary pairs takes {(pairs, groups, groups)}."
        )
    transforms = transforms.to(torch.complex128)
    rope = rows_of_pairs(spread_over_frequencies(transforms), dim)
    inverse = rows_of_pairs(spread_over_frequencies(torch.linalg.inv(transforms).mH), dim)
    selectors = head_selectors(weights)

    # The latent holds what is not turned, head by head, then the values.
    unturned = torch.arange(groups * dim).view(groups, dim)[:, 2 * pairs :].flatten()
    eye = torch.eye(groups * dim, dtype=torch.float64)
    up, down = (eye, eye) if value_factor is None else value_factor
    latent = torch.block_diag(eye[unturned], down.double())
    no_values, no_keys = eye.new_zeros(len(eye), len(down)), eye.new_zeros(len(eye), len(unturned))
    key_up = selectors @ torch.cat((eye[:, unturned], no_values), -1)
    value_up = selectors @ torch.cat((no_keys, up.double()), -1)
    offset = None
    if weights.value_bias is not None:
        # The factors need to keep values that weights alone can make; biases may lie beyond.
        bias = weights.value_bias.double()
        offset = selectors @ (bias - up.double() @ (down.double() @ bias))
    maps = LatentMaps(
        latent=latent,
        rope=torch.cat((rope, torch.zeros_like(rope)), -1),
        frequencies=weights.inverse_frequencies.double().repeat_interleave(groups),
        key_up=key_up,
        query_rope=inverse.view(-1, groups, dim)[:, key_heads_of(weights)].transpose(0, 1),
        value_up=value_up,
        value_offset=offset,
        turned=2 * pairs,
    )
    # The rotary scale stays where the source has it, for it rounds there as it does there.
    unscaled = assemble(replace(weights, rotary_scale=1.0), maps)
    source = None if unscaled.source is None else weights
    return replace(unscaled, rotary_scale=weights.rotary_scale, source=source)


def check_factor(factor: str) -> None:
    """Refuse a factor that there is not."""
    if factor not in get_args(Factor):
        raise ValueError(f"factor is {factor!r}; take {', '.join(get_args(Factor))}.")


def random_orthogonal(generator: torch.Generator, size: int) -> Tensor:
    """``(size, size)``, fp64."""
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def spread_over_frequencies(transforms: Tensor) -> Tensor:
    """``(F, n, g)`` combinations of heads within a frequency, as ``(F n, g, F)`` over all pairs."""
    pairs, count, groups = transforms.shape
    mix = transforms.new_zeros(pairs, count, groups, pairs)
    at = torch.arange(pairs)
    mix[at, :, :, at] = transforms
    return mix.reshape(pairs * count, groups, pairs)
