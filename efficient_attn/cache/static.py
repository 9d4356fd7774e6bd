"""A cache of a fixed number of sequences, each with contiguous room."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_attn.cache.rows import Pages, Rows
from efficient_attn.cache.sequences import SequenceCache, on_device, places
from efficient_attn.errors import CacheFullError


class StaticCache(SequenceCache):
    """Rows of ``batch_size`` sequences of at most ``capacity`` tokens, allocated once.

    Args:
        rows: What a token takes: :class:`KeyValueRows` or :class:`LatentRows`.
        batch_size: Number of sequences.
        capacity: Room of each, in tokens.
        dtype: Of the rows.
        device: Where they are.

    Example:
        >>> cache = StaticCache(KeyValueRows.for_map(head_map, 64), batch_size=2, capacity=1024)
        >>> cache.append(key, value)
        >>> ea.attention_decode(query, *cache.parts, cache_lengths=cache.lengths, head_map=head_map)
    """

    block_table = None

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size < 1 or capacity < 1:
            raise ValueError(
                f"batch_size is {batch_size} and capacity {capacity}; both must be at least 1."
            )
        self.rows = rows
        self.capacity = capacity
        self._pages = Pages(rows, batch_size, capacity, dtype, device)
        self._host_lengths = [0] * batch_size
        self._lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)

    @staticmethod
    def bytes_needed(rows: Rows, batch_size: int, capacity: int, dtype: torch.dtype) -> int:
        """What such a cache holds, to the byte, lengths aside."""
        return batch_size * capacity * rows.bytes_per_token(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held for rows."""
        return self._pages.nbytes

    @property
    def host_lengths(self) -> list[int]:
        """Number of cached tokens of each sequence."""
        return list(self._host_lengths)

    @property
    def lengths(self) -> Tensor:
        """The same where the rows are, ``(B,)``, int32; always the same memory."""
        return self._lengths

    def filled(self) -> tuple[Tensor, ...]:
        """Views of the parts up to the longest sequence."""
        return tuple(part.narrow(-2, 0, self.longest) for part in self.parts)

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Forget what lies behind ``lengths``, one for all sequences or one for each."""
        current = self._host_lengths
        wanted = [lengths] * len(current) if isinstance(lengths, int) else list(lengths)
        if len(wanted) != len(current) or any(length < 0 for length in wanted):
            raise ValueError(
                f"lengths is {lengths}; pass one number, or {len(current)} of them, none negative."
            )
        self._set_lengths([min(pair) for pair in zip(current, wanted, strict=True)])

    def reset(self) -> None:
        """Forget everything and keep the memory."""
        self.crop(0)

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Put sequence ``index[i]`` in place ``i``, as beam search does; some may come twice.

        Only what is filled is copied. Where the lengths differ, a tensor on a device is waited for.
        """
        count = len(self._host_lengths)
        if len(index) != count:
            raise ValueError(f"index has {len(index)} entries; it must have {count}, the batch.")
        if self.is_ragged or not isinstance(index, Tensor):
            chosen = index.tolist() if isinstance(index, Tensor) else list(index)
            if not all(0 <= i < count for i in chosen):
                raise ValueError(f"index is {chosen}; entries must lie in [0, {count}).")
            self._set_lengths([self._host_lengths[i] for i in chosen])
            index = torch.tensor(chosen)
        index = on_device(index.long(), self._lengths.device)
        for view in self.filled():
            view.copy_(view.index_select(0, index))

    def _reserve(self, counts: list[int]) -> None:
        for i, (length, count) in enumerate(zip(self._host_lengths, counts, strict=True)):
            if length + count > self.capacity:
                raise CacheFullError(
                    f"sequence {i} has {length} cached tokens and gets {count} more; this cache "
                    f"was made with capacity={self.capacity}."
                )

    def _write(self, new: Sequence[Tensor], counts: list[int], tokens: int) -> None:
        starts = self._host_lengths
        if not self.is_ragged and set(counts) == {tokens}:
            for part, x in zip(self.parts, new, strict=True):
                part.narrow(-2, starts[0], tokens).copy_(x)
        else:
            index = torch.stack(places(starts, counts, tokens))
            sequence, token, position = on_device(index, self._lengths.device)
            rows = [x.movedim(-2, 1)[sequence, token] for x in new]
            self._pages.write(sequence, position, rows)
        self._set_lengths([start + count for start, count in zip(starts, counts, strict=True)])

    def _set_lengths(self, lengths: list[int]) -> None:
        self._host_lengths = lengths
        self._lengths.copy_(on_device(lengths, self._lengths.device))
