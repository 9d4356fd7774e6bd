"""How many numbers to cache in each layer, and how many of them to turn."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.mla.compress import check_sizes, compress, lossless_rank
from efficient_attn.convert.mla.moments import LayerMoments
from efficient_attn.convert.mla.options import CompressOptions
from efficient_attn.convert.mla.pairs import pairs_of
from efficient_attn.convert.mla.rotation import components, errors_of_turning
from efficient_attn.errors import ConversionError

Choice = TypeVar("Choice", bound=Hashable)

# Sizes of the turned part that are tried.
STEPS = 8
FOLDS = (1, 2, 4, 8, 16)
# What a layer may have of an even share, where layers are given different sizes.
SHARES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def candidate_folds(weights: GroupedAttentionWeights) -> list[int]:
    """Numbers of neighbouring frequencies that may be taken for one."""
    return [fold for fold in FOLDS if not pairs_of(weights) % fold]


def candidate_rope_dims(
    weights: GroupedAttentionWeights, numbers: int, options: CompressOptions | None = None
) -> list[int]:
    """Sizes of the turned part to try within ``numbers`` cached numbers, of one fold.

    Raises:
        ConversionError: The frequencies are to be taken on a grid, and no grid leaves room.
    """
    pairs = pairs_of(weights)
    if options is not None and options.selection == "grid":
        counts = [
            n for n in range(1, pairs + 1) if not pairs % n and not options.fold % (pairs // n)
        ]
        fitting = [2 * count for count in counts if 2 * count < numbers]
        if not fitting:
            raise ConversionError(
                f"on a grid with fold {options.fold} the rotary key has at least {2 * counts[0]} "
                f"numbers, and {numbers} are cached in all. Fold more frequencies: fold="
                f"{2 * options.fold} halves it."
            )
        return fitting
    turned = 2 * pairs * weights.num_kv_heads
    most = min(turned, numbers - 1)
    step = max(2, most // STEPS // 2 * 2)
    return sorted({*range(0, most + 1, step), most // 2 * 2})


def candidates(
    weights: GroupedAttentionWeights,
    numbers: int,
    rope_dim: int | None,
    options: CompressOptions,
) -> list[tuple[int, int]]:
    """Folds and sizes of the turned part that are open, and possible, within a budget.

    Args:
        weights: The layer.
        numbers: Cached numbers per token.
        rope_dim: Those that are turned, if that is given.
        options: Choices; a fold of None is open.

    Raises:
        ConversionError: None is possible; the message tells why the last was not.
    """
    found, reason = [], None
    for fold in candidate_folds(weights) if options.fold is None else [options.fold]:
        one = replace(options, fold=fold)
        try:
            fitting = candidate_rope_dims(weights, numbers, one)
        except ConversionError as error:
            reason = error
            continue
        if rope_dim is None:
            found += [(fold, width) for width in fitting]
        elif rope_dim in fitting or options.selection != "grid" or options.fold is not None:
            found.append((fold, rope_dim))
    if not found:
        raise reason or ConversionError(f"no fold goes with a rope_dim of {rope_dim} on a grid.")
    return found


def error_curve(
    weights: GroupedAttentionWeights,
    moments: LayerMoments,
    numbers: int,
    options: CompressOptions | None = None,
    *,
    rope_dim: int | None = None,
    table: Callable[[int], Tensor] | None = None,
) -> dict[tuple[int, int], float]:
    """Expected error of one layer by fold and by the size of its turned part.

    Curves of all layers, added up, tell which are best for all; see :func:`best_choice`.

    Args:
        weights: The layer.
        moments: Its statistics.
        numbers: Cached numbers per token.
        options: Choices; none is refined here, which moves no minimum and takes most of the time.
        rope_dim: The size of the turned part, if only the fold is open.
        table: Frequencies a target has for so many turned pairs, if they are not free.
    """
    options = replace(CompressOptions() if options is None else options, refine=0)
    curve = {}
    for fold, width in candidates(weights, numbers, rope_dim, options):
        made = compress(
            weights,
            moments,
            kv_lora_rank=rank_beside(weights, numbers, width),
            rope_dim=width,
            options=replace(options, fold=fold),
            frequencies=None if table is None else table(width // 2),
        )
        curve[fold, width] = made.key_error + made.value_error
    return curve


def best_choice(curves: Iterable[Mapping[Choice, float]]) -> Choice:
    """What has the smallest sum of errors over all layers."""
    total: dict[Choice, float] = {}
    for curve in curves:
        for choice, error in curve.items():
            total[choice] = total.get(choice, 0.0) + error
    if not total:
        raise ValueError("there are no curves to choose from; pass that of every layer.")
    return min(total, key=total.__getitem__)


def divide(curves: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """Numbers for every layer, ``total`` or a little less, with the smallest sum of errors.

    Each layer begins with its fewest; the step that lowers the error most per number is taken,
    over and over, along the lower convex hull of each layer's curve.

    Args:
        curves: Error by cached numbers, for every layer.
        total: Of all layers.
    """
    hulls = [_lower_hull(sorted(curve.items())) for curve in curves]
    taken = [hull[0][0] for hull in hulls]
    left = total - sum(taken)
    if left < 0:
        raise ValueError(f"total is {total}; these layers take at least {sum(taken)}.")
    steps = sorted(
        ((e1 - e0) / (n1 - n0), layer, n1 - n0)
        for layer, hull in enumerate(hulls)
        for (n0, e0), (n1, e1) in pairwise(hull)
    )
    full = set()
    for _, layer, more in steps:
        if more <= left and layer not in full:
            taken[layer] += more
            left -= more
        else:
            full.add(layer)  # its later steps build on this one
    return taken


def sizes_by_layer(
    curves: Sequence[Mapping[int, Mapping[tuple[int, int], float]]], fold: int, total: int
) -> list[tuple[int, int]]:
    """Numbers of each layer, and how many of them are turned, for one fold.

    Args:
        curves: For each layer, by cached numbers, what :func:`error_curve` tells.
        fold: The fold of all layers.
        total: Numbers of all layers.
    """

    def best_of(curve: Mapping[tuple[int, int], float]) -> tuple[float, int]:
        return min((error, width) for (f, width), error in curve.items() if f == fold)

    best = [{n: best_of(curve) for n, curve in layer.items()} for layer in curves]
    taken = divide([{n: error for n, (error, _) in layer.items()} for layer in best], total)
    return [(n, layer[n][1]) for n, layer in zip(taken, best, strict=True)]


def rank_beside(weights: GroupedAttentionWeights, numbers: int, rope_dim: int) -> int:
    """What a budget leaves to the latent, but not more than it can use."""
    rank = min(numbers - rope_dim, lossless_rank(weights, rope_dim))
    check_sizes(weights, rank, rope_dim)
    return rank


def turning_gains(weights: GroupedAttentionWeights, moments: LayerMoments) -> Tensor:
    """``(F, g)``: what one layer gains by turning the best, second best, .. pair of a frequency."""
    found = components(weights, moments, CompressOptions().rotation)
    still = errors_of_turning(weights, moments, found, torch.zeros(1, dtype=torch.float64))
    return still.view(pairs_of(weights), weights.num_kv_heads).sort(dim=1, descending=True)[0]


def shared_table(gains: Iterable[Tensor], inverse_frequencies: Tensor, count: int) -> Tensor:
    """One table of ``count`` frequencies for all layers, fastest first, repeats allowed.

    Args:
        gains: :func:`turning_gains` of every layer.
        inverse_frequencies: ``(F,)`` of the source.
        count: Pairs to turn.
    """
    total = sum(gains)
    taken = total.flatten().argsort(descending=True, stable=True)[:count] // total.shape[1]
    return inverse_frequencies.double()[taken.sort()[0]]


def _lower_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those points of a curve that no line between two others passes below, from the left."""
    hull: list[tuple[int, float]] = []
    for n, error in points:
        while len(hull) > 1:
            (n0, e0), (n1, e1) = hull[-2:]
            if (e1 - e0) * (n - n0) < (error - e0) * (n1 - n0):
                break
            hull.pop()
        hull.append((n, error))
    # More numbers are never worse, whatever a curve says.
    return [point for i, point in enumerate(hull) if not i or point[1] < hull[i - 1][1]]
