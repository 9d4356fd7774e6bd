"""What layers ask before they attend to a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from efficient_attn.cache import SequenceCache


def check_cache_arguments(
    cache: SequenceCache | None,
    counts: Sequence[int] | None,
    causal: bool,
    replaced: Mapping[str, Tensor | None],
) -> None:
    """Refuse arguments of ``forward`` that do not go together with a cache.

    Args:
        cache: As passed to the layer, like ``counts``.
        counts: How many of the new tokens each sequence has.
        causal: Whether the layer is.
        replaced: Arguments, by name, that cannot be passed with a cache since it has its own.
    """
    if cache is None:
        if counts is not None:
            raise ValueError("counts says what a cache is to keep; pass cache= too.")
        return
    if not isinstance(cache, SequenceCache):
        raise TypeError(
            f"cache is a {type(cache).__name__}; pass a StaticCache, or a PagedCache's "
            "batch([...])."
        )
    if not causal:
        raise ValueError(
            "this layer was made with causal=False, so tokens that come later would change "
            "what was computed before; a cache needs causal=True."
        )
    for name, argument in replaced.items():
        if argument is not None:
            raise ValueError(f"{name} cannot be passed with a cache, which has its own.")


def needs_gradient(x: Tensor) -> bool:
    """Whether autograd will ask for the gradient of ``x``."""
    return torch.is_grad_enabled() and x.requires_grad
