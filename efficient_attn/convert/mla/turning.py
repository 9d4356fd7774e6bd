"""Turning by position, seen in second moments.

A row of channels that are turned in pairs is, in complex coordinates, a row of numbers each of
which is multiplied by ``exp(-i n w)`` for a key ``n`` tokens back: a pair gives a number of
frequency ``w`` and its conjugate, of ``-w``; a channel that stays gives itself, of frequency 0.
What turning does to the mean product of two numbers, over a distribution of distances, is then one
factor, the distribution's characteristic function at the difference of their frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights


@dataclass(frozen=True)
class Turning:
    """Which channels of a row are turned, and how fast.

    Attributes:
        real: ``(m,)`` channels with the real parts of the pairs.
        imaginary: ``(m,)`` channels with their imaginary parts.
        still: ``(n - 2 m,)`` channels that are not turned.
        frequencies: ``(m,)`` angle per token of each pair.
    """

    real: Tensor
    imaginary: Tensor
    still: Tensor
    frequencies: Tensor

    @property
    def all_frequencies(self) -> Tensor:
        """``(n,)`` frequency of each complex coordinate."""
        none = self.frequencies.new_zeros(len(self.still))
        return torch.cat((none, self.frequencies, -self.frequencies))

    def coordinates(self, rows: Tensor) -> Tensor:
        """Complex coordinates of ``rows``, ``(..., n, k)``: a unitary map of its rows."""
        rows = rows.to(torch.complex128)
        real, imaginary = rows[..., self.real, :], rows[..., self.imaginary, :]
        pair = real + 1j * imaginary, real - 1j * imaginary
        return torch.cat((rows[..., self.still, :], *(z * 0.5**0.5 for z in pair)), -2)

    def channels(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`coordinates`."""
        still, z, conjugate = rows.split([len(self.still)] + 2 * [len(self.real)], -2)
        found = torch.empty_like(rows)
        found[..., self.still, :] = still
        found[..., self.real, :] = (z + conjugate) * 0.5**0.5
        found[..., self.imaginary, :] = (z - conjugate) * (-1j * 0.5**0.5)
        return found


def turning_of_head(weights: GroupedAttentionWeights) -> Turning:
    """That of one head of a source layer."""
    pairs = len(weights.inverse_frequencies)
    channels = torch.arange(weights.head_dim)
    halves = channels[:pairs], channels[pairs : 2 * pairs]
    return Turning(*halves, channels[2 * pairs :], weights.inverse_frequencies.double())


def turning_of_cache(rank: int, frequencies: Tensor) -> Turning:
    """That of what MLA caches: a latent of ``rank`` numbers, then pairs of neighbours."""
    rope = rank + torch.arange(2 * len(frequencies))
    return Turning(rope[0::2], rope[1::2], torch.arange(rank), frequencies.double())


@dataclass(frozen=True)
class Distances:
    """How far back the queries of each head look.

    Attributes:
        shares: ``(H, N)``, of distances ``0 .. N - 1`` in tokens; each row adds up to one.
    """

    shares: Tensor

    def mean_phase(self, frequencies: Tensor) -> Tensor:
        """``(H, *)``: mean of ``exp(-i n w)`` at frequencies of any shape."""
        count = torch.arange(self.shares.shape[1], dtype=torch.float64)
        phases = torch.exp(-1j * count[:, None] * frequencies.flatten())
        mean = self.shares.to(phases.dtype) @ phases
        return mean.view(len(self.shares), *frequencies.shape)

    def mean(self, rows: Tensor, turning: Turning) -> Tensor:
        """Mean over distances of ``turn @ rows``, ``(H, n, k)`` for ``(..., n, k)``."""
        phase = self.mean_phase(turning.all_frequencies)[..., None]
        return turning.channels(turning.coordinates(rows) * phase).real


class MeanProduct:
    """Means over distances of products of two rows that are turned alike.

    Args:
        distances: How far back each head looks.
        left: Of the left row, ``n`` channels.
        right: Of the right row, ``m`` channels.
    """

    def __init__(self, distances: Distances, left: Turning, right: Turning) -> None:
        self.left, self.right = left, right
        (a, at), (b, to) = (
            torch.unique(each.all_frequencies, return_inverse=True) for each in (left, right)
        )
        self.phase = distances.mean_phase(a[:, None] - b)[:, at][:, :, to]

    def moment(self, product: Tensor) -> Tensor:
        """Mean of ``turn_left @ product @ turn_right.T``, ``(H, n, m)``."""
        return self._scaled(product, self.phase)

    def form(self, product: Tensor) -> Tensor:
        """Mean of ``turn_left.T @ product @ turn_right``, ``(H, n, m)``."""
        return self._scaled(product, self.phase.conj())

    def _scaled(self, product: Tensor, phase: Tensor) -> Tensor:
        z = self.right.coordinates(self.left.coordinates(product).mH).mH * phase
        return self.left.channels(self.right.channels(z.mH).mH).real
