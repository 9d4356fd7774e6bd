"""Which values attention to a cache reads, and how they weigh: the checks, and the arithmetic."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

ValueWeights = Literal["paper", "renormalised", "mean"]


def check_selection(
    top_values: int | None,
    max_dropped_mass: float | None,
    value_weights: str,
    value_mean: Tensor | None,
    return_dropped_mass: bool,
    shape: tuple[int, int, int],
) -> bool:
    """Whether anything is selected, after checking what is asked for.

    Args:
        top_values: As in :func:`efficient_attn.attention_decode`, and so on.
        max_dropped_mass: The same.
        value_weights: The same.
        value_mean: The same.
        return_dropped_mass: The same.
        shape: What ``value_mean`` must have.
    """
    if top_values is not None and max_dropped_mass is not None:
        raise ValueError(
            f"top_values is {top_values} and max_dropped_mass {max_dropped_mass}; pass one of them."
        )
    if top_values is not None:
        if not isinstance(top_values, int) or isinstance(top_values, bool):
            raise TypeError(f"top_values is {top_values!r}; pass a whole number of values.")
        if top_values < 1:
            raise ValueError(
                f"top_values is {top_values}; pass at least 1, or None to read all values."
            )
    if max_dropped_mass is not None and not 0 <= max_dropped_mass < 1:
        raise ValueError(f"max_dropped_mass is {max_dropped_mass}; it must lie in [0, 1).")
    if value_weights not in get_args(ValueWeights):
        raise ValueError(
            f"value_weights is {value_weights!r}; it must be 'paper', 'renormalised' or 'mean'."
        )
    selects = top_values is not None or max_dropped_mass is not None
    if not selects and (value_weights != "paper" or return_dropped_mass):
        raise ValueError(
            "value_weights and return_dropped_mass are about selected values; pass top_values or "
            "max_dropped_mass too."
        )
    if (value_mean is not None) != (value_weights == "mean"):
        raise ValueError(
            f"value_weights is {value_weights!r} and value_mean is "
            f"{'missing' if value_mean is None else 'given'}; pass value_mean with "
            "value_weights='mean', and only then."
        )
    if value_mean is not None and value_mean.shape != shape:
        raise ValueError(
            f"value_mean has shape {tuple(value_mean.shape)}; it must be (batch, value heads, "
            f"value dim) = {shape}."
        )
    return selects


def selective_decode(
    arguments: tuple,
    top_values: int | None,
    max_dropped_mass: float | None,
    value_weights: ValueWeights,
    value_mean: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and kept mass; ``arguments`` are those of the ``attention_decode`` op.

    The op attends to the selected keys as if there were no others, which is what ``"renormalised"``
    asks for and loses nothing however little they weigh.
    """
    out, lse, kept = torch.ops.efficient_attn.selective_decode(
        *arguments, top_values, max_dropped_mass or 0.0
    )
    if value_weights != "renormalised":
        weighted = out * kept.unsqueeze(-1)
        if value_mean is not None:
            mean = _of_query_heads(value_mean, arguments[6], out.shape[1])
            weighted += (1 - kept).unsqueeze(-1) * mean
        out = weighted.to(out.dtype)
    return out, lse, kept


def _of_query_heads(mean: Tensor, q_to_v: Tensor | None, heads: int) -> Tensor:
    """``(B, Hv, Dv)`` as ``(B, Hq, 1, Dv)``."""
    if q_to_v is None:
        return mean.repeat_interleave(heads // mean.shape[1], dim=1).unsqueeze(2)
    index = q_to_v.long().expand(len(mean), heads).unsqueeze(-1)
    return mean.gather(1, index.expand(-1, -1, mean.shape[2])).unsqueeze(2)
