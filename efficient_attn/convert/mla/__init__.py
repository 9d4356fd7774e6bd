"""From grouped-query attention to multi-head latent attention: algebra on one layer."""

from efficient_attn.convert.mla.lossless import exact, rorope

__all__ = ["exact", "rorope"]
