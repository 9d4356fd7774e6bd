"""What is cached, and how heads read it: two regressions, each the other's.

A token's ``2 g d`` keys and values ``y`` are cached as ``down @ y``, of which rotary rows are
turned by position. Head ``j`` reads its key as ``key[j] @ turn(down @ y)`` and its value as
``value[j] @ (down @ y)``. Given one side, the best other side in the mean over tokens and distances
is a linear regression: keys are to be right at every distance with one matrix for all. The mean
takes queries, keys and distances to be independent of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.mla.assemble import bias_of_keys_and_values, head_selectors
from efficient_attn.convert.mla.moments import LayerMoments
from efficient_attn.convert.mla.turning import MeanProduct, turning_of_cache, turning_of_head


@dataclass(frozen=True)
class Readers:
    """``key``, ``(H, d, r + d_r)``, and ``value``, ``(H, d, r)``."""

    key: Tensor
    value: Tensor


class Reading:
    """How well heads of one layer can read a cache, and how to improve either side.

    Args:
        weights: The layer.
        moments: Its statistics.
        rank: Rows ``r`` of the cache that are not turned, the first ones.
        frequencies: ``(d_r / 2,)`` of the pairs after them.
        key_harm: ``(H, d, d)``, the harm of an error of a head's key as a quadratic form.
        value_harm: ``(H, d, d)``, that of an error of its value.
        center_keys: Leave out what is the same for all tokens and distances.
        center_values: The same for values.
        damping: Share of the mean variance added to every variance.
    """

    def __init__(
        self,
        weights: GroupedAttentionWeights,
        moments: LayerMoments,
        rank: int,
        frequencies: Tensor,
        key_harm: Tensor,
        value_harm: Tensor,
        *,
        center_keys: bool = True,
        center_values: bool = True,
        damping: float = 0.0,
    ) -> None:
        selectors = head_selectors(weights)
        self.keys = torch.cat((selectors, torch.zeros_like(selectors)), -1)
        self.values = torch.cat((torch.zeros_like(selectors), selectors), -1)
        self.key_harm, self.value_harm = key_harm, value_harm
        self.rank, self.mean, self.second = rank, moments.mean, moments.second
        self.covariance = moments.second - torch.outer(moments.mean, moments.mean)
        self.bias = bias_of_keys_and_values(weights)
        apart = self.mean - self.bias
        self.second_without_bias = self.covariance + torch.outer(apart, apart)
        self._distances = moments.distances
        self._head, self._cache = turning_of_head(weights), turning_of_cache(rank, frequencies)
        self.mean_turn_of_head = moments.distances.mean(
            torch.eye(weights.head_dim, dtype=torch.float64), self._head
        )
        self.center_keys, self.center_values = center_keys, center_values
        self.damping = damping

    def improve_readers(self, down: Tensor, start: Readers) -> Readers:
        """The best readers of what ``down``, ``(r + d_r, 2 g d)``, caches.

        What ``start`` leaves is regressed, so that readers that are right stay as they are, and
        damping draws to them.
        """
        inner, cross = self._key_moments(down)[:2]
        key = start.key + self._solve(inner, cross - start.key @ inner)
        inner, cross = self._value_moments(down)[:2]
        value = start.value + self._solve(inner, cross - start.value @ inner)
        return Readers(key, value)

    def improve_cache(self, down: Tensor, readers: Readers) -> Tensor:
        """The best rows to cache for ``readers``; ``down`` is what they are improved from."""
        inner = readers.key.mT @ self.key_harm @ readers.key
        cross = self.key_harm @ readers.key
        left = self._of_cache.form(inner).sum(0)
        right = (self._of_head_and_cache.form(cross).mT @ self.keys).sum(0)
        left_mean, right_mean = left.clone(), right.clone()
        if self.center_keys:
            cache, head = self.mean_turn_of_cache, self.mean_turn_of_head
            left_mean -= (cache.mT @ inner @ cache).sum(0)
            right_mean -= (cache.mT @ cross.mT @ head @ self.keys).sum(0)
        value = readers.value.mT @ self.value_harm
        for matrix, other in ((left, readers.value), (right, self.values)):
            matrix[: self.rank, : other.shape[-1]] += (value @ other).sum(0)
        if not self.center_values:
            for matrix, other in ((left_mean, readers.value), (right_mean, self.values)):
                matrix[: self.rank, : other.shape[-1]] += (value @ other).sum(0)
        right, right_mean = right - left @ down, right_mean - left_mean @ down
        return down + self._step(left, right, left_mean, right_mean)

    def errors(self, down: Tensor, readers: Readers) -> tuple[float, float]:
        """Expected harm by errors of keys, and by those of values."""
        key = _remainder(readers.key, *self._key_moments(down))
        value = _remainder(readers.value, *self._value_moments(down))
        return float((key * self.key_harm).sum()), float((value * self.value_harm).sum())

    def value_offset(self, down: Tensor, readers: Readers) -> Tensor:
        """``(H, d)`` to add to values: what is left of their mean, or else of their biases."""
        known = self.mean if self.center_values else self.bias
        return (self.values - readers.value @ down[: self.rank]) @ known

    def _value_moments(self, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean products of the latent with itself, of values with it, and with themselves."""
        moment = self.covariance if self.center_values else self.second_without_bias
        latent, values = down[: self.rank], self.values
        return latent @ moment @ latent.mT, values @ moment @ latent.mT, values @ moment @ values.mT

    def _key_moments(self, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean products of the turned cache, of turned keys with it, and with themselves."""
        seen = self.second @ down.mT
        inner = self._of_cache.moment(down @ seen)
        cross = self._of_head_and_cache.moment(self.keys @ seen)
        target = self._target
        if self.center_keys:
            cached = self.mean_turn_of_cache @ (down @ self.mean)[:, None]
            key = self.mean_turn_of_head @ (self.keys @ self.mean)[..., None]
            inner = inner - cached @ cached.mT
            cross, target = cross - key @ cached.mT, target - key @ key.mT
        return inner, cross, target

    @cached_property
    def mean_turn_of_cache(self) -> Tensor:
        """``(H, r + d_r, r + d_r)``: what the turning of a row is in the mean."""
        width = self.rank + 2 * len(self._cache.frequencies)
        return self._distances.mean(torch.eye(width, dtype=torch.float64), self._cache)

    @cached_property
    def _of_cache(self) -> MeanProduct:
        return MeanProduct(self._distances, self._cache, self._cache)

    @cached_property
    def _of_head_and_cache(self) -> MeanProduct:
        return MeanProduct(self._distances, self._head, self._cache)

    @cached_property
    def _of_head(self) -> MeanProduct:
        return MeanProduct(self._distances, self._head, self._head)

    @cached_property
    def _target(self) -> Tensor:
        """Mean products of turned keys."""
        return self._of_head.moment(self.keys @ self.second @ self.keys.mT)

    @cached_property
    def _whitening(self) -> tuple[Tensor, Tensor]:
        """What makes the covariance one, and its inverse."""
        variance, axes = torch.linalg.eigh(self.covariance)
        variance = variance.clamp(min=variance[-1] * 1e-12)
        return (axes * variance.rsqrt()) @ axes.mT, (axes * variance.sqrt()) @ axes.mT

    def _solve(self, inner: Tensor, cross: Tensor) -> Tensor:
        """``cross @ inner^-1`` for positive ``inner``, damped."""
        size = inner.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        one = torch.eye(inner.shape[-1], dtype=inner.dtype)
        damped = inner + (self.damping + 1e-13) * size * one
        return torch.linalg.solve(damped, cross, left=False)

    def _step(self, left: Tensor, right: Tensor, left_mean: Tensor, right_mean: Tensor) -> Tensor:
        """Solve ``left @ x @ C + left_mean @ x @ m m^T = right @ C + right_mean @ m m^T`` for x.

        In coordinates in which the covariance ``C`` is one, the mean ``m`` is one direction.
        """
        shrink, stretch = self._whitening
        mean = shrink @ self.mean
        size = mean.square().sum()
        mean = mean / size.sqrt().clamp(min=1e-300)
        floor = left.diagonal().mean() * 1e-10 * torch.eye(len(left), dtype=left.dtype)
        whole = torch.linalg.solve(left + floor, right @ stretch)
        along = (right + size * right_mean) @ stretch @ mean
        along = torch.linalg.solve(left + size * left_mean + floor, along)
        whole = whole + torch.outer(along - whole @ mean, mean)
        return whole @ shrink


def _remainder(reader: Tensor, inner: Tensor, cross: Tensor, target: Tensor) -> Tensor:
    """Mean product of ``target - reader @ cached`` with itself."""
    mixed = reader @ cross.mT
    return target - mixed - mixed.mT + reader @ inner @ reader.mT
