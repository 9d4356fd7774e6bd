"""Where tokens that were attended to before are kept: contiguous or in pages."""

from efficient_attn.cache.paged import PagedBatch, PagedCache
from efficient_attn.cache.rows import KeyValueRows, LatentRows
from efficient_attn.cache.sequences import SequenceCache
from efficient_attn.cache.static import StaticCache

__all__ = [
    "KeyValueRows",
    "LatentRows",
    "PagedBatch",
    "PagedCache",
    "SequenceCache",
    "StaticCache",
]
