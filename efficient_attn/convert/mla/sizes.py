"""How many cached numbers to turn: the rest of a budget is the latent's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.mla.compress import check_sizes, compress, lossless_rank
from efficient_attn.convert.mla.moments import LayerMoments
from efficient_attn.convert.mla.options import CompressOptions
from efficient_attn.convert.mla.pairs import pairs_of
from efficient_attn.convert.mla.rotation import components, errors_of_turning
from efficient_attn.errors import ConversionError

# Sizes of the turned part that are tried.
STEPS = 8


def candidate_rope_dims(
    weights: GroupedAttentionWeights, numbers: int, options: CompressOptions | None = None
) -> list[int]:
    """Sizes of the turned part to try within ``numbers`` cached numbers.

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


def error_curve(
    weights: GroupedAttentionWeights,
    moments: LayerMoments,
    numbers: int,
    options: CompressOptions | None = None,
    *,
    table: Callable[[int], Tensor] | None = None,
) -> dict[int, float]:
    """Expected error of one layer by the size of its turned part.

    Curves of all layers, added up, tell which size is best for all; see :func:`best_rope_dim`.

    Args:
        weights: The layer.
        moments: Its statistics.
        numbers: Cached numbers per token.
        options: Choices; none is refined here, which moves no minimum and takes most of the time.
        table: Frequencies a target has for so many turned pairs, if they are not free.
    """
    options = replace(CompressOptions() if options is None else options, refine=0)
    curve = {}
    for rope_dim in candidate_rope_dims(weights, numbers, options):
        made = compress(
            weights,
            moments,
            kv_lora_rank=rank_beside(weights, numbers, rope_dim),
            rope_dim=rope_dim,
            options=options,
            frequencies=None if table is None else table(rope_dim // 2),
        )
        curve[rope_dim] = made.key_error + made.value_error
    return curve


def best_rope_dim(curves: Iterable[Mapping[int, float]]) -> int:
    """The size of the turned part with the smallest sum of errors over layers."""
    total: dict[int, float] = {}
    for curve in curves:
        for rope_dim, error in curve.items():
            total[rope_dim] = total.get(rope_dim, 0.0) + error
    if not total:
        raise ValueError("there are no curves to choose from; pass that of every layer.")
    return min(total, key=total.__getitem__)


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
