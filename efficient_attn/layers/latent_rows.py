"""What layers have in common that cache one row of a token for all heads together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from efficient_attn.cache import LatentRows, SequenceCache
from efficient_attn.layers._caching import check_cache_arguments


class LatentLayer(nn.Module, ABC):
    """What layers have in common that keep one row of a token for all heads together.

    A subclass says what the row is (:meth:`project`, :attr:`cache_rows`) and how queries read rows
    (:meth:`attend`, and :meth:`decode` if it can do without expanding them).

    Attributes:
        causal: Whether a query sees only the keys up to its own position, counted from the end.
        window: ``(left, right)`` keys visible beside that position, ``None`` for no limit.
    """

    causal: bool
    window: tuple[int | None, int | None] | None

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        key_lengths: Tensor | None = None,
        bias: Tensor | None = None,
        cache: SequenceCache | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend from ``x`` to itself, or to a cache that ``x`` is added to.

        Args:
            x: ``(B, N, E)``.
            positions: Position of each token, ``(N,)`` or ``(B, N)``; by default ``0 .. N - 1``,
                with a cache from its end on.
            key_lengths: How many leading tokens each sample has, int ``(B,)``.
            bias: Added to the scores, broadcastable to ``(B, H, N, M)``; ``-inf`` masks.
            cache: What came before ``x`` in each sequence, holding :attr:`cache_rows`; rows of
                ``x`` are appended. It holds no graph, so tokens that need a gradient are refused.
            counts: With a cache, how many tokens of ``x`` each sequence has: the last ones, and
                padding before them, whose output means nothing. By default all.

        Returns:
            ``(B, N, E)``.
        """
        check_cache_arguments(cache, counts, self.causal, {"key_lengths": key_lengths})
        if x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, tokens, width).")
        if positions is None:
            tokens = x.shape[1]
            positions = (
                torch.arange(tokens, device=x.device)
                if cache is None
                else cache.positions(tokens, counts)
            )
        query, rows = self.project(x, positions)
        if cache is not None:
            cache.append(rows, counts=counts)
            if bias is None and self.can_decode(query):
                return self.combine(
                    self.decode(query, *cache.parts, cache.lengths, cache.block_table)
                )
            (rows,) = cache.filled()
            key_lengths = cache.lengths if cache.is_ragged else None
            end = rows.shape[1] if key_lengths is None else key_lengths.unsqueeze(1)
            positions = row_positions(positions, end, rows.shape[1])
        options = {"causal": self.causal, "window": self.window}
        options |= {"bias": bias, "key_lengths": key_lengths}
        return self.combine(self.attend(query, rows, positions, **options))

    @abstractmethod
    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Query heads ``(B, H, N, D_qk)`` and what is cached of each token, ``(B, N, width)``."""

    @abstractmethod
    def attend(self, query: Tensor, rows: Tensor, positions: Tensor, **options: object) -> Tensor:
        """Attended heads ``(B, H, N, D_v)``.

        Args:
            query: As :meth:`project` gives it.
            rows: ``(B, M, width)``, cached or just projected.
            positions: Those of the rows, ``(M,)`` or ``(B, M)``.
            options: Of :func:`efficient_attn.attention`: order, window, bias and lengths.
        """

    def can_decode(self, query: Tensor) -> bool:
        """Whether :meth:`decode` takes these queries; by default never."""
        return False

    def decode(
        self, query: Tensor, rows: Tensor, lengths: Tensor, block_table: Tensor | None = None
    ) -> Tensor:
        """:meth:`attend` for few queries, reading a dense or paged cache where it lies."""
        raise TypeError(f"{type(self).__name__} cannot read rows without expanding them.")

    def combine(self, out: Tensor) -> Tensor:
        """From attended heads ``(B, H, N, D_v)`` to tokens ``(B, N, E)``."""
        return self.o_proj(rearrange(out, "b h n d -> b n (h d)"))

    @property
    @abstractmethod
    def cache_rows(self) -> LatentRows:
        """What a cache for this layer keeps of a token."""

    def reset_parameters(self) -> None:
        """Reinitialise every part that has parameters of its own."""
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


def row_positions(positions: Tensor, end: int | Tensor, count: int) -> Tensor:
    """Positions of ``count`` cached rows that lie one behind the other.

    Args:
        positions: Of the newest tokens, ``(N,)`` or ``(B, N)``.
        end: How many rows there are up to the newest token; ``(B, 1)`` where that differs.
        count: Number of rows, those included that are still empty.

    Returns:
        ``(count,)`` or ``(B, count)``.
    """
    return positions[..., -1:] + 1 - end + torch.arange(count, device=positions.device)


def pages_of_one(rows: Tensor, block_table: Tensor | None, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """A cache of which only some rows are read, without a copy: every row is a page of its own.

    Args:
        rows: ``(B, S, width)``, or ``(pages, page_size, width)`` with a block table.
        block_table: Which page holds which block of a sequence.
        chosen: The rows of each sequence, ``(B, count)``.

    Returns:
        The rows as pages, ``(places, 1, width)``, and the block table of the chosen ones.
    """
    pages, page_size, width = rows.shape
    if block_table is None:
        page = torch.arange(pages, device=rows.device).unsqueeze(1)
    else:
        # Behind the end of a sequence anything may be chosen, and is never read.
        block = (chosen // page_size).clamp(max=block_table.shape[1] - 1)
        page = block_table.gather(1, block)
    table = page * page_size + chosen % page_size
    return rows.reshape(pages * page_size, 1, width), table.int()
