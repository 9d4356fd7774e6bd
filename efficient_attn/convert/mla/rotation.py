"""Which combinations of rotary pairs go on being turned, and how fast.

Pairs of one frequency may be mixed among heads by any invertible map, for it commutes with their
turning (RoRoPE); pairs of like frequencies nearly so (FreqFold). What is to be turned is then
chosen among the combinations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.mla.moments import LayerMoments
from efficient_attn.convert.mla.pairs import key_heads_of, pairs_of, rows_of_pairs

Rotation = Literal["none", "real", "unitary", "query-aware"]


@dataclass(frozen=True)
class Components:
    """``K = g F`` combinations of the rotary pairs of all heads.

    Attributes:
        key: ``(K, g, F)`` complex; component ``k`` of a key is the sum of ``key[k] * z``.
        query: ``(K, g, F)`` complex, the inverse of its adjoint: what queries have to be combined
            with for the same scores.
        frequency: ``(K,)`` index of the frequency that stands for a component.
    """

    key: Tensor
    query: Tensor
    frequency: Tensor


@dataclass(frozen=True)
class RotaryPart:
    """What is turned: ``rows @ keys``, by ``frequencies``, read by ``query_rows @ queries``.

    Attributes:
        rows: ``(d_r, g d)``, pairs in neighbouring rows.
        query_rows: ``(d_r, g d)``.
        frequencies: ``(d_r / 2,)``.
    """

    rows: Tensor
    query_rows: Tensor
    frequencies: Tensor


def frequency_transforms(
    weights: GroupedAttentionWeights, moments: LayerMoments, rotation: Rotation
) -> Tensor:
    """Mixes ``(F, g, g)`` of the heads of each frequency, the component that matters most first.

    ``"real"`` has the eigenvectors of TransMLA, ``"unitary"`` those of complex pairs.
    ``"query-aware"`` weighs keys by the queries that meet them, and is not orthogonal.
    """
    found = components(weights, moments, rotation)
    pairs, groups = pairs_of(weights), weights.num_kv_heads
    at = torch.arange(pairs)
    return found.key.view(pairs, groups, groups, pairs)[at, :, :, at]


def components(
    weights: GroupedAttentionWeights, moments: LayerMoments, rotation: Rotation, fold: int = 1
) -> Components:
    """Combinations of pairs, group by group of ``fold`` frequencies, within one by energy.

    Source: TransMLA (arXiv 2502.07864v3), RoRoPE and FreqFold; for the score's error, ours.
    """
    groups, pairs = weights.num_kv_heads, pairs_of(weights)
    if fold < 1 or pairs % fold:
        raise ValueError(f"fold is {fold}; it must divide the {pairs} rotary pairs of a head.")
    moment = pair_moment(weights, moments)
    need = query_need(weights, moments).sqrt()
    key, query = (moment.new_zeros(pairs * groups, groups, pairs) for _ in range(2))
    width = fold * groups
    for start in range(0, pairs, fold):
        folded = slice(start, start + fold)
        rows = slice(start * groups, start * groups + width)
        local = moment[:, folded, :, folded].reshape(width, width)
        if rotation == "none":
            mix = torch.eye(width, dtype=local.dtype)
        elif rotation == "real":
            mix = _eigenvectors(local.real).mH.to(local.dtype)
        elif rotation == "unitary":
            mix = _eigenvectors(local).mH
        elif rotation == "query-aware":
            weight = need[:, folded].flatten().clamp(min=need.max() * 1e-6)
            mix = _eigenvectors(local * weight[:, None] * weight).mH * weight
        else:
            raise ValueError(f"rotation is {rotation!r}; take none, real, unitary or query-aware.")
        key[rows, :, folded] = mix.view(width, groups, fold)
        query[rows, :, folded] = torch.linalg.inv(mix).mH.reshape(width, groups, fold)
    return Components(key, query, torch.arange(pairs * groups) // width * fold)


def pair_moment(weights: GroupedAttentionWeights, moments: LayerMoments) -> Tensor:
    """Mean of ``z z^H`` over all pairs of all heads, ``(g, F, g, F)`` complex."""
    groups, dim, pairs = weights.num_kv_heads, weights.head_dim, pairs_of(weights)
    keys = moments.second[: groups * dim, : groups * dim].view(groups, dim, groups, dim)
    real, imaginary = slice(0, pairs), slice(pairs, 2 * pairs)

    def part(a: slice, b: slice) -> Tensor:
        return keys[:, a, :, b]

    return torch.complex(
        part(real, real) + part(imaginary, imaginary), part(imaginary, real) - part(real, imaginary)
    )


def query_need(weights: GroupedAttentionWeights, moments: LayerMoments) -> Tensor:
    """Harm per squared error of each pair of each key head, by the queries on it: ``(g, F)``."""
    pairs = pairs_of(weights)
    found = torch.zeros(weights.num_kv_heads, pairs, dtype=torch.float64)
    return found.index_add_(0, key_heads_of(weights), _energy_of_queries(weights, moments))


def errors_of_turning(
    weights: GroupedAttentionWeights, moments: LayerMoments, found: Components, speeds: Tensor
) -> Tensor:
    """Expected harm ``(K, m)`` of turning each component by each of ``speeds``, ``(m,)``.

    Over a distribution of distances ``n``, ``exp(i n theta)`` is replaced by the best multiple of
    ``exp(i n phi)``, which leaves ``1 - |E exp(i n (theta - phi))|^2`` of its energy.
    """
    moment = pair_moment(weights, moments).flatten(0, 1).flatten(1)
    key = found.key.flatten(1)
    energy = ((key @ moment) * key.conj()).sum(-1).real
    apart = weights.inverse_frequencies.double()[:, None] - speeds
    left = 1 - moments.distances.mean_phase(apart).abs().square()  # (H, F, m)
    read = found.query.abs().square()[:, key_heads_of(weights)]  # (K, H, F)
    need = _energy_of_queries(weights, moments)
    return energy[:, None] * torch.einsum("khf,hf,hfm->km", read, need, left)


def choose(
    weights: GroupedAttentionWeights,
    moments: LayerMoments,
    found: Components,
    count: int,
    *,
    table: Tensor | None = None,
) -> RotaryPart:
    """The ``count`` components that are worst to leave unturned, each at the best frequency.

    Args:
        weights: The layer.
        moments: Its statistics.
        found: Components to choose from.
        count: How many to turn.
        table: ``(count,)`` frequencies there are; by default every component has its own.
    """
    still = torch.zeros(1, dtype=torch.float64)
    unturned = errors_of_turning(weights, moments, found, still)
    if not count:
        none = torch.zeros(0, dtype=torch.long)
        return rotary_part(weights, found, none, still[:0])
    if table is None:
        own = weights.inverse_frequencies.double()
        gain = unturned - errors_of_turning(weights, moments, found, own)
        best, speed = gain.max(1)
        taken = best.argsort(descending=True, stable=True)[:count]
        taken = taken[speed[taken].argsort(stable=True)]
        return rotary_part(weights, found, taken, own[speed[taken]])
    if len(table) != count:
        raise ValueError(f"table has {len(table)} frequencies for {count} turned pairs.")
    gain = unturned - errors_of_turning(weights, moments, found, table.double())
    chosen = torch.zeros(count, dtype=torch.long)
    for _ in range(count):
        component, slot = divmod(int(gain.argmax()), count)
        chosen[slot] = component
        gain[component], gain[:, slot] = -torch.inf, -torch.inf
    return rotary_part(weights, found, chosen, table.double())


def choose_on_grid(
    weights: GroupedAttentionWeights, found: Components, rope_dim: int
) -> RotaryPart:
    """TransMLA's choice: every ``d / d_r``-th frequency, one leading component for each."""
    pairs, groups, count = pairs_of(weights), weights.num_kv_heads, rope_dim // 2
    group_starts, sizes = torch.unique(found.frequency, return_counts=True)
    fold = int(sizes[0]) // groups
    collapse = pairs // max(count, 1)
    if count < 1 or pairs % count or fold % collapse:
        raise ValueError(
            f"rope_dim is {rope_dim} with fold {fold}; on a grid, the {2 * pairs} rotary channels "
            "of a head must be a multiple of rope_dim, and fold a multiple of their ratio."
        )
    place = torch.arange(fold // collapse)
    taken = (group_starts[:, None] * groups + place).flatten()
    frequency = (group_starts[:, None] + place * collapse).flatten()
    return rotary_part(weights, found, taken, weights.inverse_frequencies.double()[frequency])


def rotary_part(
    weights: GroupedAttentionWeights, found: Components, taken: Tensor, frequencies: Tensor
) -> RotaryPart:
    """Components in the real form in which they are cached and read."""
    rows, query_rows = (
        rows_of_pairs(each[taken], weights.head_dim) for each in (found.key, found.query)
    )
    return RotaryPart(rows, query_rows, frequencies)


def _energy_of_queries(weights: GroupedAttentionWeights, moments: LayerMoments) -> Tensor:
    """Harm per squared error of each pair of the key that each head reads: ``(H, F)``."""
    pairs = pairs_of(weights)
    channels = moments.query.diagonal(dim1=1, dim2=2)
    energy = channels[:, :pairs] + channels[:, pairs : 2 * pairs]
    return weights.scale**2 * moments.key_weight[:, None] * energy / 2


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Those of the largest eigenvalue first, in columns."""
    return torch.linalg.eigh(matrix)[1].flip(-1)
