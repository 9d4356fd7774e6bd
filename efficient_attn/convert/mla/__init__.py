"""From grouped-query attention to multi-head latent attention: algebra on one layer."""

from efficient_attn.convert.mla.compress import Compressed, compress, lossless_rank, turned_in_part
from efficient_attn.convert.mla.lossless import exact, factorise, rorope
from efficient_attn.convert.mla.moments import LayerMoments, MomentAccumulator, calibrate
from efficient_attn.convert.mla.options import CompressOptions
from efficient_attn.convert.mla.query_latent import query_rank, with_query_latent
from efficient_attn.convert.mla.rotation import frequency_transforms
from efficient_attn.convert.mla.sizes import (
    best_choice,
    divide,
    error_curve,
    rank_beside,
    shared_table,
    turning_gains,
)

__all__ = [
    "CompressOptions",
    "Compressed",
    "LayerMoments",
    "MomentAccumulator",
    "best_choice",
    "calibrate",
    "compress",
    "divide",
    "error_curve",
    "exact",
    "factorise",
    "frequency_transforms",
    "lossless_rank",
    "query_rank",
    "rank_beside",
    "rorope",
    "shared_table",
    "turned_in_part",
    "turning_gains",
    "with_query_latent",
]
