"""Exact attention over dense tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.functional import _contract as contract
from efficient_attn.head_map import HeadMap
from efficient_attn.masking import Window, window_limits


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    head_map: HeadMap | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which any query head may read any key head and any value head.

    The result is exact. Gradients flow through ``out``, ``lse`` and ``bias``, and are the same bits
    from run to run.

    Args:
        query: Queries. Any strides are accepted, here and below.
        key: Keys.
        value: Values.
        head_map: Which key and value head each query head reads; by default even groups.
        causal: Hide later keys. Aligned to the lower right corner: the last query sees every key.
        window: ``(left, right)``, the number of keys visible on each side of the diagonal, None
            for unlimited. A causal window over the last ``w`` keys is ``(w - 1, 0)``.
        scale: Factor on the scores; by default ``D ** -0.5``.
        softcap: If positive, scores become ``softcap * tanh(score / softcap)``.
        bias: Added to the scores after scale and softcap; ``-inf`` hides a key.
        key_lengths: Number of valid keys per sample. A sample behaves as if its keys and values
            were cut to this length, the causal corner included; what lies behind is never read.
        return_lse: Return the log-sum-exp of the scores too.

    Returns:
        ``out``, or ``(out, lse)``. A query that sees no key gives zeros and ``lse = -inf``.

    Shape:
        - query: ``(B, Hq, Nq, D)``; key: ``(B, Hk, Nk, D)``; value: ``(B, Hv, Nk, Dv)``
        - bias: broadcastable to ``(B, Hq, Nq, Nk)``; key_lengths: ``(B,)``
        - out: ``(B, Hq, Nq, Dv)``, stored so that merging the heads is a view
        - lse: ``(B, Hq, Nq)``, natural logarithm, fp32 (fp64 for fp64 inputs)

    Raises:
        ValueError: A shape, a length or the head map does not fit.
        TypeError: A dtype or a kind does not fit.
        UnsupportedError: The input is valid, but no kernel on its device can honour it.

    Example:
        >>> query = torch.randn(1, 8, 128, 64)
        >>> key, value = torch.randn(1, 3, 128, 64), torch.randn(1, 3, 128, 64)
        >>> attention(query, key, value, head_map=HeadMap.from_group_sizes([5, 2, 1])).shape
        torch.Size([1, 8, 128, 64])
    """
    contract.check_tensors(query, key, value, ("batch", "heads", "tokens", "dim"))
    contract.check_bias(bias, query, key)
    contract.check_key_lengths(key_lengths, key)
    maps = contract.resolve_map(head_map, query, key, value, heads=1, rows=query.shape[0])
    out, lse = torch.ops.efficient_attn.attention(
        query,
        key,
        value,
        *maps,
        bias,
        key_lengths,
        *window_limits(causal, window),
        contract.resolve_scale(scale, query),
        contract.check_softcap(softcap),
    )
    return (out, lse) if return_lse else out
