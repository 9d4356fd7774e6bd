"""Queries made from a latent of their own: fewer weights, the same cache."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import (
    GroupedAttentionWeights,
    LatentAttentionWeights,
)


def with_query_latent(
    converted: LatentAttentionWeights,
    source: GroupedAttentionWeights,
    rank: int,
    inputs: Tensor | None = None,
) -> LatentAttentionWeights:
    """A converted layer whose queries are made from ``rank`` numbers of a latent.

    The latent holds the principal components of the source's queries; the queries of the converted
    layer, which are linear in those, are regressed on it.

    Args:
        converted: The layer, without norms on query heads.
        source: What it was converted from.
        rank: Numbers ``q_r`` of the latent, at most :func:`query_rank`, where nothing is lost.
        inputs: ``(D, D)`` second moment of the layer's inputs; by default that of white ones.

    Source: activation-aware low-rank queries, as ``--q-lora-rank`` of TransMLA's code has them.
    """
    most = query_rank(source)
    if not 1 <= rank <= most:
        raise ValueError(
            f"q_lora_rank is {rank}; the queries of this layer take from 1 to {most}, where "
            "nothing is lost any more."
        )
    query = source.query.double()
    seen = query.mT if inputs is None else inputs @ query.mT  # C W^T
    size, axes = (each.flip(-1)[..., :rank] for each in torch.linalg.eigh(query @ seen))
    # Directions that no input has are read by nobody.
    inverse = torch.where(size > size[0] * 1e-13, 1 / size, 0.0)
    down, up = axes.mT @ query, converted.query.double() @ seen @ axes * inverse
    return replace(converted, query=up, query_down=down)


def query_rank(source: GroupedAttentionWeights) -> int:
    """The width from which on a latent of queries loses nothing."""
    return min(source.query.shape)
