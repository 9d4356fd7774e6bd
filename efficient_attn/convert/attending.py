"""Attention computed straight from the weights of one layer, before and after its conversion.

For calibration and for measuring what a conversion changed: one sequence at a time, in the dtype of
the input, in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from efficient_attn.convert.attention_weights import (
    GroupedAttentionWeights,
    LatentAttentionWeights,
    Weights,
    with_tensors,
)
from efficient_attn.convert.mla.moments import heads_of, turned


def in_fp32(weights: Weights, device: torch.device | str = "cpu") -> Weights:
    """The same layer on a device, with matrices, biases and norms in fp32."""

    def change(name: str, x: Tensor) -> Tensor:
        return x.to(device) if name == "inverse_frequencies" else x.to(device, torch.float32)

    return with_tensors(weights, change)


def grouped_attention(weights: GroupedAttentionWeights, x: Tensor) -> Tensor:
    """Attention of one sequence ``(N, D)``, through the output projection.

    The order of operations is that of the models: projections, norms on heads, rotation, softmax.
    """
    query, key, value = (
        heads_of(weights, x, name).transpose(0, 1) for name in ("query", "key", "value")
    )
    query, key = turned(query, weights), turned(key, weights)
    out = _attended(weights, query, key, value, enable_gqa=True)
    return F.linear(out, weights.output.to(x.dtype), _bias(weights.output_bias, x))


def latent_attention(weights: LatentAttentionWeights, x: Tensor) -> Tensor:
    """The same of a converted layer."""
    out = latent_heads(weights, x)
    return F.linear(out, weights.output.to(x.dtype), _bias(weights.output_bias, x))


def latent_heads(weights: LatentAttentionWeights, x: Tensor) -> Tensor:
    """What enters its output projection, ``(N, H d_v)``, its latent expanded to heads."""
    heads, nope, rope = weights.num_heads, weights.qk_nope_head_dim, weights.qk_rope_head_dim
    if weights.source is None:
        seen = x if weights.query_down is None else x @ weights.query_down.to(x.dtype).mT
        query = F.linear(seen, weights.query.to(x.dtype), _bias(weights.query_bias, x))
        query = rearrange(query, "n (h d) -> h n d", h=heads)
        features = x
    else:
        query, key, value = (heads_of(weights.source, x, n) for n in ("query", "key", "value"))
        query = query.transpose(0, 1) @ weights.query.to(x.dtype).mT
        features = torch.cat((key.flatten(1), value.flatten(1)), -1)
    rows = F.linear(features, weights.latent_down.to(x.dtype), _bias(weights.latent_down_bias, x))
    latent, key_rope = rows.split((weights.kv_lora_rank, rope), -1)
    expanded = rearrange(latent @ weights.latent_up.to(x.dtype).mT, "n (h d) -> h n d", h=heads)
    key, value = expanded.split((nope, weights.v_head_dim), -1)
    query, query_rope = query.split((nope, rope), -1)
    key_rope = _turned_neighbours(key_rope[None], weights).expand(heads, -1, -1)
    query = torch.cat((query, _turned_neighbours(query_rope, weights)), -1)
    return _attended(weights, query, torch.cat((key, key_rope), -1), value)


def with_own_heads(
    weights: GroupedAttentionWeights, key_index: Tensor, value_index: Tensor
) -> GroupedAttentionWeights:
    """The same layer with a key and a value head for every query head.

    Args:
        weights: A layer with as many key and value heads as there are rows for.
        key_index: ``(H,)``, the key head of each query head.
        value_index: The same for value heads.
    """
    width = len(weights.query) // weights.num_heads
    changed: dict[str, object] = {"num_kv_heads": weights.num_heads}
    for name, index in (("key", key_index), ("value", value_index)):
        for rows in (name, f"{name}_bias"):
            x = getattr(weights, rows)
            if x is not None:
                changed[rows] = x.unflatten(0, (-1, width))[index].flatten(0, 1)
    return replace(weights, **changed)


def output_error(
    before: GroupedAttentionWeights, after: GroupedAttentionWeights, x: Tensor
) -> float:
    """Relative change of a layer's output on one sequence ``(N, D)``."""
    truth, got = (grouped_attention(in_fp32(weights), x) for weights in (before, after))
    return float((got - truth).norm() / truth.norm().clamp(min=1e-30))


def _attended(
    weights: GroupedAttentionWeights | LatentAttentionWeights,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **options: bool,
) -> Tensor:
    """Heads side by side, ``(N, H d)``."""
    tokens = query.shape[1]
    is_causal = not isinstance(weights, GroupedAttentionWeights) or weights.causal
    order: dict[str, object] = {"is_causal": is_causal}
    if weights.window is not None and weights.window < tokens:
        at = torch.arange(tokens, device=query.device)
        distance = at[:, None] - at
        order = {"attn_mask": (distance >= 0) & (distance < weights.window)}
    heads = (query[None], key[None], value[None])
    out = F.scaled_dot_product_attention(*heads, scale=weights.scale, **order, **options)[0]
    return rearrange(out, "h n d -> n (h d)")


def _turned_neighbours(x: Tensor, weights: LatentAttentionWeights) -> Tensor:
    """``(heads, N, d_r)`` turned by their positions, pairs being neighbours."""
    positions = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    angle = positions[:, None] * weights.inverse_frequencies.double()
    cos, sin = (part.to(x.dtype) * weights.rotary_scale for part in (angle.cos(), angle.sin()))
    first, second = x[..., 0::2], x[..., 1::2]
    pair = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(pair, -1).flatten(-2)


def _bias(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
