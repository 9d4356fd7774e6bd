"""The key heads, or the value heads, of one layer as random vectors with known moments.

What may be done to a head without changing the layer, given that queries or the output projection
undo it: any invertible map of value heads; of key heads, one that commutes with their rotation,
which is a complex number for each rotary pair and anything for channels that are not turned. Where
key heads are normalised, nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights

# Share of the mean that is added to a metric, so that its inverse root exists.
RIDGE = 1e-6


@dataclass(frozen=True)
class Heads:
    """``n`` heads of ``d`` channels, fp64.

    Attributes:
        second: Second moments across heads, ``(n, d, n, d)``.
        mean: ``(n, d)``.
        metric: ``(n, d, d)``; an error ``e`` of head ``h`` costs ``e @ metric[h] @ e``.
        pairs: Rotary pairs ``F``: channels ``f`` and ``f + F``, for ``f < F``, turn together.
        mixable: Whether what reads the heads can undo a map of them.
        ignores_shift: Whether a constant added to a head changes nothing.
    """

    second: Tensor
    mean: Tensor
    metric: Tensor
    pairs: int = 0
    mixable: bool = True
    ignores_shift: bool = False

    def __getitem__(self, chosen: list[int]) -> Heads:
        """Some of the heads."""
        second = self.second[chosen][:, :, chosen]
        return replace(self, second=second, mean=self.mean[chosen], metric=self.metric[chosen])

    def __len__(self) -> int:
        return self.second.shape[0]

    @property
    def dim(self) -> int:
        """Channels ``d`` of a head."""
        return self.second.shape[1]

    @property
    def moment(self) -> Tensor:
        """Second moments of what matters, ``(n, d, n, d)``: about the mean if shifts do not."""
        if not self.ignores_shift:
            return self.second
        return self.second - einsum(self.mean, self.mean, "n d, m e -> n d m e")

    @property
    def energy(self) -> float:
        """What it would cost to give up all heads."""
        return float(einsum(self.moment, self.metric, "n d n e, n d e ->"))


def heads_of(weights: GroupedAttentionWeights, second: Tensor) -> tuple[Heads, Heads]:
    """The key heads and the value heads of a layer.

    Errors of keys are weighed by the queries that meet them, which makes them errors of scores;
    errors of values by the output projection, which makes them errors of the layer's output.

    Args:
        weights: The layer.
        second: Moments of its inputs, :attr:`InputMoments.second`.
    """
    count, pairs = weights.num_kv_heads, len(weights.inverse_frequencies)
    second = second.to(weights.key.device)
    query = _with_bias(weights.query, weights.query_bias, weights.num_heads)
    key = _with_bias(weights.key, weights.key_bias, count)
    value = _with_bias(weights.value, weights.value_bias, count)

    normed = weights.key_norm is not None or weights.query_norm is not None
    if normed:
        eye = torch.eye(key.shape[1], dtype=torch.float64, device=key.device)
        met = eye.expand(count, -1, -1)
    else:
        met = einsum(query, second, query, "h d x, x y, h e y -> h d e")
        met = _commuting(rearrange(met, "(g r) d e -> g r d e", g=count).sum(1), pairs)
    output = rearrange(weights.output.double(), "o (g r d) -> g (r o) d", g=count, d=value.shape[1])
    keys = Heads(
        *_moments(key, second),
        metric=_invertible(met),
        pairs=pairs,
        mixable=not normed,
        ignores_shift=pairs == 0 and not normed,
    )
    values = Heads(
        *_moments(value, second),
        metric=_invertible(output.mT @ output),
    )
    return keys, values


def _with_bias(matrix: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Projection and bias side by side, ``(heads, d, D + 1)`` fp64."""
    bias = matrix.new_zeros(len(matrix)) if bias is None else bias
    joined = torch.cat((matrix.double(), bias.double().unsqueeze(1)), 1)
    return rearrange(joined, "(h d) x -> h d x", h=heads)


def _moments(projection: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return (
        einsum(projection @ second, projection, "n d x, m e x -> n d m e"),
        projection @ second[:, -1],
    )


def _commuting(metric: Tensor, pairs: int) -> Tensor:
    """The part of a metric that is the same at every angle of the pairs."""
    turned = 2 * pairs
    diagonal = metric.diagonal(dim1=-2, dim2=-1)[..., :turned]
    mean = diagonal.unflatten(-1, (2, pairs)).mean(-2).repeat(1, 2)
    found = torch.zeros_like(metric)
    found[..., turned:, turned:] = metric[..., turned:, turned:]
    found.diagonal(dim1=-2, dim2=-1)[..., :turned] = mean
    return found


def _invertible(metric: Tensor) -> Tensor:
    """``metric`` with a small multiple of the identity added; the identity where all is zero."""
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(mean > 0, RIDGE * mean, 1.0)
    eye = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    return metric + ridge[:, None, None] * eye
