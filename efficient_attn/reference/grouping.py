"""How many query heads each key head serves, by the norms of the key heads."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores that differ by less than this share of the largest say nothing.
SMALLEST_SPREAD = 1e-6


def key_norms(key: Tensor, key_lengths: Tensor | None = None) -> Tensor:
    """The Frobenius norm of every key head: ``N[b, g] = ||K[b, g, :n_b]||_F``, in fp32.

    Shape:
        - key: ``(B, G, N, D)``; key_lengths: ``(B,)``, how many leading tokens count
        - output: ``(B, G)``
    """
    lengths = [key.shape[2]] * key.shape[0] if key_lengths is None else key_lengths.tolist()
    rows = [x[:, :n].double().square().sum((1, 2)) for x, n in zip(key, lengths, strict=True)]
    return torch.stack(rows).sqrt().float()


def allocate_heads(
    scores: Tensor, num_heads: int, min_queries: int, min_max: bool, nearest: bool
) -> tuple[Tensor, Tensor]:
    """Cut ``num_heads`` query heads into contiguous groups, the larger the higher the score.

    The share of a group is its score over the sum of scores (``min_max``: after the lowest score
    became 0 and the highest 1). The quotas of the ``num_heads - G * min_queries`` heads that are
    left to divide become whole numbers by their largest remainders. ``nearest`` is the published
    way: round half to even, then take from the largest group or give to the smallest, the first of
    equals, until the sum is right.

    Scores that are equal, negative or not finite give even groups; the first ones take what is
    left over.

    Shape:
        - scores: ``(R, G)``
        - sizes: ``(R, G)``, int32; index: ``(R, num_heads)``, int32, the group of each head
    """
    sizes = torch.stack([_sizes(x, num_heads, min_queries, min_max, nearest) for x in scores])
    groups = torch.arange(scores.shape[1])
    index = torch.stack([groups.repeat_interleave(row) for row in sizes])
    return sizes.int(), index.int()


def _sizes(scores: Tensor, num_heads: int, min_queries: int, min_max: bool, nearest: bool):
    low, high, groups = scores.min(), scores.max(), len(scores)
    shares = (scores - low) / (high - low) if min_max else scores
    total = shares.double().sum().float()
    tells = scores.isfinite().all() and low >= 0 and high - low > SMALLEST_SPREAD * high
    if not (tells and total.isfinite()):
        return num_heads // groups + (torch.arange(groups) < num_heads % groups).long()
    free = num_heads - min_queries * groups
    quotas = shares / total * free
    if nearest:
        sizes = quotas.round().long()
        while sizes.sum() > free:
            sizes[sizes.argmax()] -= 1
        while sizes.sum() < free:
            sizes[sizes.argmin()] += 1
    else:
        sizes = quotas.floor().long()
        by_remainder = (quotas - sizes).argsort(descending=True, stable=True)
        sizes[by_remainder[: free - sizes.sum()]] += 1
    return sizes + min_queries
