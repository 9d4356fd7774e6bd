"""What all caches have in common: sequences that grow at their end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_attn.cache.rows import Pages


class SequenceCache(ABC):
    """A batch of cached sequences, as attention reads it.

    ``attention_decode(query, *cache.parts, cache_lengths=cache.lengths,
    block_table=cache.block_table)`` attends to it, and so does ``mla_decode``.

    The host knows every length, so nothing here waits for a device.
    """

    _pages: Pages

    @property
    @abstractmethod
    def host_lengths(self) -> list[int]:
        """Number of cached tokens of each sequence."""

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """The same where the rows are, ``(B,)``, int32."""

    @property
    @abstractmethod
    def block_table(self) -> Tensor | None:
        """Which page holds which block of a sequence, ``(B, blocks)``; None if contiguous."""

    @abstractmethod
    def filled(self) -> tuple[Tensor, ...]:
        """The parts up to the longest sequence, contiguous: ``(B, heads, longest, dim)``.

        Behind the length of a sequence lies anything.
        """

    @abstractmethod
    def _reserve(self, counts: list[int]) -> None:
        """Make room, or raise CacheFullError and change nothing."""

    @abstractmethod
    def _write(self, new: Sequence[Tensor], counts: list[int], tokens: int) -> None:
        """Write into the room that was made, and count."""

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The memory that holds the rows: keys and values, or latents."""
        return self._pages.parts

    @property
    def longest(self) -> int:
        """The largest number of tokens in a sequence."""
        return max(self.host_lengths, default=0)

    @property
    def is_ragged(self) -> bool:
        """Whether lengths differ."""
        return len(set(self.host_lengths)) > 1

    def append(self, *new: Tensor, counts: Sequence[int] | None = None) -> None:
        """Append tokens to every sequence.

        Args:
            *new: For each part, ``(B, heads, N, dim)``, or ``(B, N, dim)`` where it has no heads.
            counts: How many of the ``N`` each sequence gets: its last ones, for padding comes
                first. By default all.

        Raises:
            CacheFullError: There is no room. Nothing was changed.
            ValueError: A shape, a device or a count does not fit.
            TypeError: A dtype does not fit.
            UnsupportedError: The tokens carry a gradient.
        """
        batch_size = len(self.host_lengths)
        tokens = self._pages.check(new, batch_size)
        counts = check_counts(counts, batch_size, tokens)
        self._reserve(counts)
        self._write(new, counts, tokens)

    def positions(self, tokens: int, counts: Sequence[int] | None = None) -> Tensor:
        """Where the next tokens will stand in their sequences; padding stands at 0.

        Shape:
            - output: ``(tokens,)`` if that is the same for all, otherwise ``(B, tokens)``
        """
        starts, device = self.host_lengths, self.parts[0].device
        counts = check_counts(counts, len(starts), tokens)
        firsts = [start + count - tokens for start, count in zip(starts, counts, strict=True)]
        steps = torch.arange(tokens, device=device)
        if len(set(firsts)) == 1:
            return (firsts[0] + steps).clamp_(min=0)
        return (on_device(firsts, device).unsqueeze(1) + steps).clamp_(min=0)


def check_counts(counts: Sequence[int] | None, batch_size: int, tokens: int) -> list[int]:
    """One count for each sequence, between none and all of the tokens."""
    if counts is None:
        return [tokens] * batch_size
    if isinstance(counts, Tensor):
        raise TypeError("counts is a tensor; pass integers that the host knows, counts.tolist().")
    counts = list(counts)
    if len(counts) != batch_size or not all(0 <= count <= tokens for count in counts):
        raise ValueError(
            f"counts is {counts}; pass {batch_size} integers, one for each sequence, from 0 to "
            f"{tokens}, the number of new tokens."
        )
    return counts


def places(
    starts: Sequence[int], counts: Sequence[int], tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token that is no padding: its sequence, which of the new ones it is, its position.

    On the host, one after the other.
    """
    counts_, starts_ = (torch.tensor(x).unsqueeze(1) for x in (counts, starts))
    first = tokens - counts_
    steps = torch.arange(tokens)
    sequence, token = (steps >= first).nonzero(as_tuple=True)
    return sequence, token, (starts_ + steps - first)[sequence, token]


def on_device(values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Integers from the host, copied without waiting for the device."""
    x = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int32)
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
