"""Fewer cached numbers than the source has: what is turned, the latent, and how both are read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from efficient_attn.convert.attention_weights import (
    GroupedAttentionWeights,
    LatentAttentionWeights,
)
from efficient_attn.convert.mla.assemble import LatentMaps, assemble
from efficient_attn.convert.mla.moments import LayerMoments
from efficient_attn.convert.mla.options import CompressOptions
from efficient_attn.convert.mla.pairs import pairs_of
from efficient_attn.convert.mla.readers import Readers, Reading
from efficient_attn.convert.mla.rotation import RotaryPart, choose, choose_on_grid, components


@dataclass(frozen=True)
class Compressed:
    """A compressed layer and what it is expected to cost.

    Attributes:
        weights: The layer.
        key_error: Mean squared error of the layer's output by errors of keys, to first order.
        value_error: The same by errors of values.
    """

    weights: LatentAttentionWeights
    key_error: float
    value_error: float


def compress(
    weights: GroupedAttentionWeights,
    moments: LayerMoments,
    *,
    kv_lora_rank: int,
    rope_dim: int,
    options: CompressOptions | None = None,
    frequencies: Tensor | None = None,
) -> Compressed:
    """One layer with ``kv_lora_rank + rope_dim`` cached numbers per token.

    Args:
        weights: The layer.
        moments: Its statistics; see :func:`efficient_attn.convert.mla.calibrate`.
        kv_lora_rank: Numbers ``r`` of the latent, at most :func:`lossless_rank`.
        rope_dim: Numbers ``d_r`` of the rotary key: even, and at most ``2 g F``, which keeps all.
        options: The choices; by default what measurably helps.
        frequencies: ``(d_r / 2,)`` that the target can turn by, if it is not free.

    Raises:
        ValueError: The sizes are out of range, with what is accepted.

    Source: TransMLA (arXiv 2502.07864v3) for the form; choices beyond
        :meth:`CompressOptions.paper` are ours.
    """
    options = CompressOptions() if options is None else options
    check_sizes(weights, kv_lora_rank, rope_dim)
    part, reading = _turned(weights, moments, kv_lora_rank, rope_dim, options, frequencies)
    down, readers = start(weights, reading, part, kv_lora_rank, options)
    if options.refit:
        readers = reading.improve_readers(down, readers)
    for _ in range(options.refine):
        down = reading.improve_cache(down, readers)
        readers = reading.improve_readers(down, readers)
    key_error, value_error = reading.errors(down, readers)
    return Compressed(_assembled(weights, part, reading, down, readers), key_error, value_error)


def turned_in_part(
    weights: GroupedAttentionWeights,
    moments: LayerMoments,
    *,
    rope_dim: int,
    options: CompressOptions | None = None,
    frequencies: Tensor | None = None,
) -> LatentAttentionWeights:
    """The layer with ``rope_dim`` turned channels as :func:`compress` has it, the rest all kept.

    What it loses is lost by turning less, and what :func:`compress` loses beyond that by its rank.
    """
    options = CompressOptions() if options is None else options
    rank = lossless_rank(weights, rope_dim)
    check_sizes(weights, rank, rope_dim)
    part, reading = _turned(weights, moments, rank, rope_dim, options, frequencies)
    down, readers = start(weights, reading, part, rank, options)
    return _assembled(weights, part, reading, down, readers)


def lossless_rank(weights: GroupedAttentionWeights, rope_dim: int) -> int:
    """The rank from which on a latent loses nothing beside ``rope_dim`` turned channels."""
    rank = 2 * len(weights.key) - rope_dim
    if weights.query_norm is None and weights.key_norm is None:
        # Without norms, keys and values are linear in the layer's input.
        rank = min(rank, weights.key.shape[1])
    return rank


def check_sizes(weights: GroupedAttentionWeights, kv_lora_rank: int, rope_dim: int) -> None:
    """Refuse sizes that no layer of this source can have."""
    turned = 2 * pairs_of(weights) * weights.num_kv_heads
    if rope_dim % 2 or not 0 <= rope_dim <= turned:
        raise ValueError(
            f"rope_dim is {rope_dim}; it must be even and at most {turned}, all that the "
            f"{weights.num_kv_heads} key heads of this layer turn."
        )
    most = lossless_rank(weights, rope_dim)
    if not 1 <= kv_lora_rank <= most:
        raise ValueError(
            f"kv_lora_rank is {kv_lora_rank}; beside {rope_dim} turned channels it must be from 1 "
            f"to {most}, where nothing is lost any more."
        )


def _turned(
    weights: GroupedAttentionWeights,
    moments: LayerMoments,
    rank: int,
    rope_dim: int,
    options: CompressOptions,
    frequencies: Tensor | None,
) -> tuple[RotaryPart, Reading]:
    """What is turned, and how well a latent beside it can be read."""
    if options.fold is None:
        raise ValueError("fold is None, and one layer cannot choose it; pass a number.")
    found = components(weights, moments, options.rotation, options.fold)
    if options.selection == "grid":
        part = choose_on_grid(weights, found, rope_dim)
        if frequencies is not None:
            part = replace(part, frequencies=frequencies.double())
    else:
        part = choose(weights, moments, found, rope_dim // 2, table=frequencies)
    reading = Reading(
        weights,
        moments,
        rank,
        part.frequencies,
        *harms(weights, moments, part, options),
        center_keys=options.center,
        center_values=options.center and options.output_bias,
        damping=options.damping,
    )
    return part, reading


def _assembled(
    weights: GroupedAttentionWeights,
    part: RotaryPart,
    reading: Reading,
    down: Tensor,
    readers: Readers,
) -> LatentAttentionWeights:
    rank = reading.rank
    maps = LatentMaps(
        latent=down[:rank],
        rope=down[rank:],
        frequencies=part.frequencies,
        key_up=readers.key[..., :rank],
        query_rope=readers.key[..., rank:].mT,
        value_up=readers.value,
        value_offset=reading.value_offset(down, readers),
    )
    return assemble(weights, maps)


def harms(
    weights: GroupedAttentionWeights,
    moments: LayerMoments,
    part: RotaryPart,
    options: CompressOptions,
) -> tuple[Tensor, Tensor]:
    """Quadratic forms ``(H, d, d)`` of the harm by errors of each head's key, and of its value."""
    heads, dim = weights.num_heads, weights.head_dim
    if options.metric == "output":
        output = rearrange(weights.output.double(), "e (h d) -> h e d", h=heads)
        key_harm = weights.scale**2 * moments.key_weight[:, None, None] * moments.query
        return key_harm, moments.value_weight[:, None, None] * (output.mT @ output)
    one = torch.eye(dim, dtype=torch.float64).expand(heads, -1, -1)
    if options.metric == "plain":
        return one, one
    return one / balance(weights, moments, part) ** 2, one


def balance(weights: GroupedAttentionWeights, moments: LayerMoments, part: RotaryPart) -> float:
    """Root mean square of keys without what is turned, over that of values (TransMLA's alpha)."""
    rows = len(weights.key)
    rest = unturned_part(part, rows)
    keys = (rest @ moments.second[:rows, :rows] @ rest.mT).trace()
    values = moments.second[rows:, rows:].trace()
    return float((keys / values).sqrt()) if keys > 0 else 1.0


def unturned_part(part: RotaryPart, rows: int) -> Tensor:
    """``(g d, g d)``: keys without the components that are turned."""
    return torch.eye(rows, dtype=torch.float64) - part.query_rows.mT @ part.rows


def start(
    weights: GroupedAttentionWeights,
    reading: Reading,
    part: RotaryPart,
    rank: int,
    options: CompressOptions,
) -> tuple[Tensor, Readers]:
    """Principal components of values and of keys without what is turned, and how to read them."""
    rows = len(weights.key)
    rest = unturned_part(part, rows)
    keys = reading.keys.clone()
    keys[..., :rows] = keys[..., :rows] @ rest
    if options.shrink:
        keys = reading.mean_turn_of_head @ keys
    weight = (keys.mT @ reading.key_harm @ keys).sum(0)
    weight = weight + (reading.values.mT @ reading.value_harm @ reading.values).sum(0)
    size, axes = torch.linalg.eigh(weight)
    size = size.clamp(min=0)
    root = (axes * size.sqrt()) @ axes.mT
    kept = size > size[-1] * 1e-13
    inverse_root = (axes[:, kept] * size[kept].rsqrt()) @ axes[:, kept].mT
    moment = reading.covariance if options.center else reading.second_without_bias
    basis = torch.linalg.eigh(root @ moment @ root)[1].flip(-1)[:, :rank]
    latent, up = basis.mT @ root, inverse_root @ basis
    rope = torch.cat((part.rows, torch.zeros_like(part.rows)), -1)
    turned = reading.keys[..., :rows] @ part.query_rows.mT
    key = torch.cat((keys @ up, turned), -1)
    return torch.cat((latent, rope)), Readers(key, reading.values @ up)
