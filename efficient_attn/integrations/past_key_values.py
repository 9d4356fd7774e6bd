"""Caches of this package as ``past_key_values`` of a transformers model.

They work with every attention implementation; ``efficient_attn`` decodes from their memory where it
lies::

    from efficient_attn.integrations.past_key_values import StaticPastKeyValues
    model.generate(**inputs, past_key_values=StaticPastKeyValues(capacity=4096))

Every layer keeps all tokens, those with a sliding window too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, CacheLayerMixin

from efficient_attn.cache import KeyValueRows, PagedBatch, PagedCache, SequenceCache, StaticCache


class _PastKeyValues(Cache):
    @property
    def nbytes(self) -> int:
        """Bytes held for keys and values, in all layers; 0 before the first tokens."""
        return sum(layer.nbytes for layer in self.layers)


class StaticPastKeyValues(_PastKeyValues):
    """Keys and values in memory that is taken once, when the first tokens come.

    Greedy search, sampling, beam search and assisted decoding; nothing is copied to grow.

    Args:
        capacity: Room of each sequence in tokens, prompt included. With more,
            :class:`~efficient_attn.CacheFullError` is raised.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layer_class_to_replicate=functools.partial(_StaticLayer, capacity))


class PagedPastKeyValues(_PastKeyValues):
    """Keys and values in pages, which beams and forks share.

    Args:
        num_pages: Number of pages in each layer, for all sequences together. With more,
            :class:`~efficient_attn.CacheFullError` is raised.
        page_size: Tokens in a page.
    """

    def __init__(self, num_pages: int, page_size: int = 16) -> None:
        super().__init__(
            layer_class_to_replicate=functools.partial(_PagedLayer, num_pages, page_size)
        )

    def fork(self) -> PagedPastKeyValues:
        """The same tokens, to be continued otherwise; pages are shared and copied on write.

        ``reset()`` gives the pages of a fork back.
        """
        fork = copy.copy(self)
        fork.layers = [layer.fork() for layer in self.layers]
        return fork

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue sequence ``beam_idx[i]`` in place ``i``."""
        # Read back from a device once for all layers.
        super().reorder_cache(beam_idx.tolist())


class _Layer(CacheLayerMixin):
    """What one layer keeps; all sequences are equally long, as models of transformers have it."""

    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        self.is_initialized = False
        self.cached: SequenceCache | None = None

    @property
    def keys(self) -> Tensor | None:
        return self.filled()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        return self.filled()[1] if self.is_initialized else None

    @property
    def batch_size(self) -> int:
        return len(self.cached.host_lengths) if self.is_initialized else -1

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        changed = self.batch_size != key_states.shape[0]
        if not self.is_initialized or (changed and not self.get_seq_length()):
            self.lazy_initialization(key_states, value_states)
            self.is_initialized = True
        self.cached.append(key_states, value_states)
        return self.filled()

    def get_seq_length(self) -> int:
        return self.cached.longest if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many tokens, given as a negative number; a positive one is what to keep."""
        if self.is_initialized:
            removed = tokens_to_remove <= 0
            length = tokens_to_remove + (self.get_seq_length() if removed else 0)
            self.crop_to(max(length, 0))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.select([b for b in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.select(torch.arange(self.batch_size)[indices.cpu()].tolist())


class _StaticLayer(_Layer):
    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        return self.cached.nbytes if self.is_initialized else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.cached = self.new_cache(key_states, value_states, key_states.shape[0])

    def new_cache(self, key: Tensor, value: Tensor, batch_size: int) -> StaticCache:
        return StaticCache(
            _rows(key, value), batch_size, self.capacity, dtype=key.dtype, device=key.device
        )

    def filled(self) -> tuple[Tensor, Tensor]:
        return self.cached.filled()

    def get_max_length(self) -> int:
        return self.capacity

    def crop_to(self, length: int) -> None:
        self.cached.crop(length)

    def reset(self) -> None:
        self.crop(-self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cached.reorder(beam_idx)

    def select(self, index: list[int]) -> None:
        key, value = (x[index] for x in self.cached.filled())
        self.cached = self.new_cache(key, value, len(index))
        self.cached.append(key, value)


class _PagedLayer(_Layer):
    def __init__(self, num_pages: int, page_size: int) -> None:
        super().__init__()
        self.num_pages = num_pages
        self.page_size = page_size
        self.pool: PagedCache | None = None

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes if self.pool else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.pool = self.pool or PagedCache(
            _rows(key_states, value_states), self.num_pages, self.page_size,
            dtype=key_states.dtype, device=key_states.device,
        )  # fmt: skip
        self.cached = self.pool.batch([self.pool.allocate() for _ in key_states])

    def filled(self) -> tuple[Tensor, Tensor]:
        gather = functools.cache(self.cached.filled)
        return tuple(InPages(self.cached, part, gather) for part in range(2))

    def get_max_length(self) -> int:
        return -1

    def crop_to(self, length: int) -> None:
        for sequence in self.cached.sequences:
            self.pool.crop(sequence, length)

    def reset(self) -> None:
        if self.is_initialized:
            for sequence in self.cached.sequences:
                self.pool.free(sequence)
            self.cached, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        self.select([int(i) for i in beam_idx])

    def select(self, index: list[int]) -> None:
        before = self.cached.sequences
        self.cached = self.pool.batch([self.pool.fork(before[i]) for i in index])
        for sequence in before:
            self.pool.free(sequence)

    def fork(self) -> _PagedLayer:
        layer = _PagedLayer(self.num_pages, self.page_size)
        layer.pool, layer.is_initialized = self.pool, self.is_initialized
        if self.is_initialized:
            layer.cached = self.pool.batch([self.pool.fork(s) for s in self.cached.sequences])
        return layer


def _rows(key: Tensor, value: Tensor) -> KeyValueRows:
    return KeyValueRows(key.shape[1], value.shape[1], key.shape[-1], value.shape[-1])


class InPages(Tensor):
    """Keys or values of a paged cache, ``(B, heads, tokens, dim)``.

    Attention that knows pages takes them from ``batch``. Whatever else looks at this tensor gets a
    copy of the rows, gathered at the first look.

    Args:
        batch: The sequences.
        part: Which of its parts: 0 for keys, 1 for values.
        gather: Gives the parts without pages.
    """

    batch: PagedBatch

    @staticmethod
    def __new__(cls, batch: PagedBatch, part: int, gather: Callable) -> InPages:
        """A tensor without memory of its own."""
        pages = batch.parts[part]
        _, heads, _, dim = pages.shape
        return Tensor._make_wrapper_subclass(
            cls,
            (len(batch.sequences), heads, batch.longest, dim),
            dtype=pages.dtype,
            device=pages.device,
        )

    def __init__(self, batch: PagedBatch, part: int, gather: Callable) -> None:
        self.batch = batch
        self._rows = lambda: gather()[part]

    # Without this, results would be made members of this class again.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Run ``function`` on the gathered rows."""
        args, kwargs = tree_map_only(cls, lambda x: x._rows(), (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"InPages(shape={tuple(self.shape)}, dtype={self.dtype})"
