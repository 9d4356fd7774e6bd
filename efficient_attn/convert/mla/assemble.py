"""From linear maps between activations to the weights of one MLA layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from efficient_attn.convert.attention_weights import (
    GroupedAttentionWeights,
    LatentAttentionWeights,
)
from efficient_attn.convert.mla.pairs import key_heads_of, query_gain


@dataclass(frozen=True)
class LatentMaps:
    """What MLA computes from the queries, keys and values of its source, all fp64.

    ``y`` stands for the ``2 g d`` keys, not turned, and values of a token. With gains that the
    rotary scale asks for already taken out, and up to what is the same for all keys of a query::

        latent, key_rope = latent @ y, rope @ y
        key of head j, turned  ~  key_up[j] @ latent + query_rope[j].T @ turn(key_rope)
        value of head j        ~  value_up[j] @ latent + value_offset[j]

    Attributes:
        latent: ``(r, 2 g d)``.
        rope: ``(d_r, 2 g d)``, pairs in neighbouring rows.
        frequencies: ``(d_r / 2,)``.
        key_up: ``(H, d, r)``.
        query_rope: ``(H, d_r, d)``.
        value_up: ``(H, d_v, r)``.
        value_offset: ``(H, d_v)`` or None for zeros.
        turned: Leading channels of a query head that no latent serves, so that ``key_up`` holds
            zeros in their rows and ``d_n = d - turned``.
    """

    latent: Tensor
    rope: Tensor
    frequencies: Tensor
    key_up: Tensor
    query_rope: Tensor
    value_up: Tensor
    value_offset: Tensor | None = None
    turned: int = 0


def assemble(weights: GroupedAttentionWeights, maps: LatentMaps) -> LatentAttentionWeights:
    """Fold the projections of a layer into ``maps``; where norms forbid it, keep them as source.

    Biases of keys on the latent are dropped, for they shift all scores of a query alike; biases of
    values, weighted by probabilities whose sum is one, go to the output's bias.
    """
    heads, dim = weights.num_heads, weights.head_dim
    nope = torch.eye(dim, dtype=torch.float64)[maps.turned :].expand(heads, -1, -1)
    query = torch.cat((nope, maps.query_rope), 1) * query_gain(weights)
    down = torch.cat((maps.latent, maps.rope))
    up = torch.cat((maps.key_up[:, maps.turned :], maps.value_up), 1)
    offset = maps.value_offset
    query_bias = down_bias = source = None
    if weights.query_norm is not None or weights.key_norm is not None:
        source = weights
    else:
        bias = bias_of_keys_and_values(weights)
        if bias.any():
            rank = len(maps.latent)
            down_bias = down @ bias
            shift = maps.value_up @ down_bias[:rank]
            offset = shift if offset is None else offset + shift
            down_bias[:rank] = 0.0
            down_bias = down_bias if down_bias.any() else None
        down = down @ torch.cat((weights.key, weights.value)).double()
        if weights.query_bias is not None:
            per_head = weights.query_bias.double().view(heads, dim)
            query_bias = einsum(query, per_head, "h n d, h d -> h n").flatten()
        per_head = rearrange(weights.query.double(), "(h d) e -> h d e", h=heads)
        query = rearrange(query @ per_head, "h n e -> (h n) e")
    return LatentAttentionWeights(
        query=query,
        latent_down=down,
        latent_up=rearrange(up, "h n r -> (h n) r"),
        output=weights.output.double(),
        num_heads=heads,
        qk_nope_head_dim=dim - maps.turned,
        v_head_dim=maps.value_up.shape[1],
        inverse_frequencies=maps.frequencies,
        scale=weights.scale,
        query_bias=query_bias,
        latent_down_bias=down_bias,
        output_bias=_output_bias(weights, offset),
        window=weights.window,
        source=source,
    )


def head_selectors(weights: GroupedAttentionWeights) -> Tensor:
    """``(H, d, g d)``: the head that each query head reads, out of all heads side by side."""
    groups, dim = weights.num_kv_heads, weights.head_dim
    eye = torch.eye(groups * dim, dtype=torch.float64).view(groups, dim, groups * dim)
    return eye[key_heads_of(weights)]


def bias_of_keys_and_values(weights: GroupedAttentionWeights) -> Tensor:
    """``(2 g d,)`` biases that are added to all keys and values last; norms leave none on keys."""
    zero = torch.zeros(len(weights.key), dtype=torch.float64)
    key = None if weights.key_norm is not None else weights.key_bias
    return torch.cat(
        [zero if bias is None else bias.double() for bias in (key, weights.value_bias)]
    )


def _output_bias(weights: GroupedAttentionWeights, value_offset: Tensor | None) -> Tensor | None:
    bias = None if weights.output_bias is None else weights.output_bias.double()
    if value_offset is None or not value_offset.any():
        return bias
    constant = weights.output.double() @ value_offset.flatten()
    return constant if bias is None else bias + constant
