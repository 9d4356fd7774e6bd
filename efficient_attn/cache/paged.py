"""A pool of pages that sequences of any length share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_attn.cache.rows import Pages, Rows
from efficient_attn.cache.sequences import SequenceCache, on_device, places
from efficient_attn.errors import CacheFullError


class PagedCache:
    """Sequences in pages of a common pool, which they can share.

    A sequence takes pages as it grows and gives them back when it is cropped or freed. A fork
    shares the pages of its origin; a page that is shared and not yet full is copied when one of its
    sequences appends to it.

    Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention, section 4.

    Args:
        rows: What a token takes: :class:`KeyValueRows` or :class:`LatentRows`.
        num_pages: Number of pages in the pool.
        page_size: Tokens in a page.
        dtype: Of the rows.
        device: Where they are.

    Example:
        >>> cache = PagedCache(rows, num_pages=256)
        >>> batch = cache.batch([cache.allocate(), cache.allocate()])
        >>> batch.append(key, value)
        >>> ea.attention_decode(
        ...     query, *batch.parts, cache_lengths=batch.lengths, block_table=batch.block_table
        ... )
    """

    def __init__(
        self,
        rows: Rows,
        num_pages: int,
        page_size: int = 16,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(
                f"num_pages is {num_pages} and page_size {page_size}; both must be at least 1."
            )
        self.rows = rows
        self.num_pages = num_pages
        self.page_size = page_size
        self._pages = Pages(rows, num_pages, page_size, dtype, device)
        self._free = list(range(num_pages))[::-1]
        self._owners = [0] * num_pages
        self._sequences: dict[int, _Sequence] = {}
        self._allocated = 0
        # Counts changes of page lists, so that a batch knows when its block table is out of date.
        self._version = 0

    @staticmethod
    def bytes_needed(rows: Rows, num_pages: int, page_size: int, dtype: torch.dtype) -> int:
        """What such a pool holds, to the byte."""
        return num_pages * page_size * rows.bytes_per_token(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held for rows, used or not."""
        return self._pages.nbytes

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that are alive."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Number of cached tokens of a sequence."""
        return self._alive(sequence).length

    def allocate(self) -> int:
        """A new, empty sequence; its number is never given again."""
        return self._add(_Sequence([], 0))

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens, in the same pages."""
        origin = self._alive(sequence)
        for page in origin.pages:
            self._owners[page] += 1
        return self._add(_Sequence(list(origin.pages), origin.length))

    def crop(self, sequence: int, length: int) -> None:
        """Forget what lies behind ``length``, and give back pages that hold nothing else."""
        if length < 0:
            raise ValueError(f"length is {length}; it must not be negative.")
        held = self._alive(sequence)
        held.length = min(held.length, length)
        self._release(held, self._blocks(held.length))

    def free(self, sequence: int) -> None:
        """Give back all pages of a sequence, which is then no more."""
        self._release(self._alive(sequence), 0)
        del self._sequences[sequence]

    def batch(self, sequences: Sequence[int]) -> PagedBatch:
        """These sequences, in this order, as attention reads them and layers append to them."""
        return PagedBatch(self, sequences)

    def _alive(self, sequence: int) -> _Sequence:
        if sequence in self._sequences:
            return self._sequences[sequence]
        known = 0 <= sequence < self._allocated
        raise ValueError(
            f"sequence {sequence} {'was freed before' if known else 'was never allocated'}; "
            "allocate() and fork() give sequences that are alive."
        )

    def _add(self, sequence: _Sequence) -> int:
        number = self._allocated
        self._allocated += 1
        self._sequences[number] = sequence
        return number

    def _blocks(self, length: int) -> int:
        return -(-length // self.page_size)

    def _release(self, held: _Sequence, keep: int) -> None:
        for page in reversed(held.pages[keep:]):
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)
            self._version += 1
        del held.pages[keep:]

    def _reserve(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Give each sequence pages of its own for that many more tokens, or change nothing."""
        held = [self._alive(sequence) for sequence in sequences]
        growing = [(x, count) for x, count in zip(held, counts, strict=True) if count]
        # Of the sequences that write to one page, the last needs no copy if nobody else holds it.
        writers = Counter(x.pages[-1] for x, _ in growing if x.length % self.page_size)
        copies = sum(min(n, self._owners[page] - 1) for page, n in writers.items())
        fresh = sum(self._blocks(x.length + count) - len(x.pages) for x, count in growing)
        if copies + fresh > len(self._free):
            raise CacheFullError(
                f"{copies + fresh} more pages are needed and {len(self._free)} of "
                f"{self.num_pages} are free; free or crop sequences, or make a larger pool. "
                "Nothing was changed."
            )
        for x, count in growing:
            if x.length % self.page_size and self._owners[x.pages[-1]] > 1:
                shared = x.pages[-1]
                self._owners[shared] -= 1
                x.pages[-1] = self._take()
                self._pages.copy(shared, x.pages[-1])
            while len(x.pages) < self._blocks(x.length + count):
                x.pages.append(self._take())

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        self._version += 1
        return page


class _Sequence:
    """The pages of a sequence, none to spare, and the number of tokens in them."""

    def __init__(self, pages: list[int], length: int) -> None:
        self.pages = pages
        self.length = length


class PagedBatch(SequenceCache):
    """Some sequences of a :class:`PagedCache`, which makes one with ``batch``."""

    def __init__(self, cache: PagedCache, sequences: Sequence[int]) -> None:
        if not sequences:
            raise ValueError("sequences is empty; a batch has at least one.")
        if len(set(sequences)) != len(sequences):
            raise ValueError(
                f"sequences is {list(sequences)}; one comes twice. Use fork() to continue a "
                "sequence in two ways."
            )
        self.cache = cache
        self.sequences = tuple(sequences)
        self._pages = cache._pages
        self._version = -1
        self._held()

    @property
    def host_lengths(self) -> list[int]:
        """Number of cached tokens of each sequence."""
        return [x.length for x in self._held()]

    @property
    def lengths(self) -> Tensor:
        """The same where the rows are, ``(B,)``, int32."""
        return on_device(self.host_lengths, self.parts[0].device)

    @property
    def block_table(self) -> Tensor:
        """The page of each block of a sequence, ``(B, blocks)``, int32."""
        self._update_table()
        return self._table

    def filled(self) -> tuple[Tensor, ...]:
        """Copies of the rows, contiguous, up to the longest sequence."""
        table = self.block_table.long()
        return tuple(
            part[table].movedim(1, -3).flatten(-3, -2).narrow(-2, 0, self.longest)
            for part in self.parts
        )

    def _held(self) -> list[_Sequence]:
        return [self.cache._alive(sequence) for sequence in self.sequences]

    def _update_table(self) -> None:
        held = self._held()
        if self._version == self.cache._version:
            return
        self._version = self.cache._version
        blocks = max((len(x.pages) for x in held), default=0)
        rows = [x.pages + [0] * (blocks - len(x.pages)) for x in held]
        self._host_table = torch.tensor(rows, dtype=torch.int32).reshape(len(held), blocks)
        self._table = on_device(self._host_table, self.parts[0].device)

    def _reserve(self, counts: list[int]) -> None:
        self.cache._reserve(self.sequences, counts)

    def _write(self, new: Sequence[Tensor], counts: list[int], tokens: int) -> None:
        held = self._held()
        sequence, token, position = places(self.host_lengths, counts, tokens)
        self._update_table()
        page = self._host_table[sequence, position // self.cache.page_size]
        index = torch.stack([sequence, token, page.long(), position % self.cache.page_size])
        sequence, token, page, offset = on_device(index, self.parts[0].device)
        self._pages.write(page, offset, [x.movedim(-2, 1)[sequence, token] for x in new])
        for x, count in zip(held, counts, strict=True):
            x.length += count
