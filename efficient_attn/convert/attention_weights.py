"""The weights of one attention layer: as a grouped-query checkpoint has them, and as MLA does.

A conversion maps :class:`GroupedAttentionWeights` to :class:`LatentAttentionWeights`. What reads
checkpoints makes the first, what writes or loads converted ones takes the second, and the algebra
between them never sees a file or a model class. Matrices are ``(out, in)``, as PyTorch keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Weights = TypeVar("Weights", bound="GroupedAttentionWeights | LatentAttentionWeights")


@dataclass(frozen=True)
class GroupedAttentionWeights:
    """One source layer: ``num_heads`` query heads (H) on ``num_kv_heads`` key/value heads (g).

    ``D`` is the embedding width and ``d`` the width of a head. Channels ``f`` and
    ``f + F`` of a head, ``F = len(inverse_frequencies)``, are one rotary pair; channels from
    ``2 F`` on are not turned. Where ``query_norm`` and ``key_norm`` are given, each head is RMS
    normalised with them after its projection and before its rotation.

    Attributes:
        query: ``(H d, D)``, ``query_bias`` ``(H d,)`` or None.
        key: ``(g d, D)``, ``key_bias`` ``(g d,)`` or None.
        value: ``(g d, D)``, ``value_bias`` ``(g d,)`` or None.
        output: ``(D, H d)``, ``output_bias`` ``(D,)`` or None.
        query_norm: ``(d,)`` or None.
        key_norm: ``(d,)`` or None.
        norm_eps: Epsilon of the two norms.
        inverse_frequencies: ``(F,)``, angle per token of each pair, after any scaling.
        rotary_scale: Factor on every rotated query and key (yarn's attention factor).
        scale: Factor on every score.
        window: Keys that a query sees, itself included; None for all before it.
        causal: Whether a query sees itself and what is before it alone.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    num_heads: int
    num_kv_heads: int
    inverse_frequencies: Tensor
    scale: float
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    output_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    norm_eps: float = 1e-6
    rotary_scale: float = 1.0
    window: int | None = None
    causal: bool = True

    @property
    def head_dim(self) -> int:
        """Width ``d`` of a query, key or value head."""
        return self.key.shape[0] // self.num_kv_heads


@dataclass(frozen=True)
class LatentAttentionWeights:
    r"""One MLA layer: H query heads, a latent of ``r`` numbers, a rotary key of ``d_r`` for all.

    With ``x`` a row of the layer's input, ``features(x)`` the source's rotation-free keys and
    values where norms stand between them and the latent (see below), else ``x`` itself::

        latent, key_rope = split(latent_down @ features(x) + latent_down_bias)
        query_nope, query_rope = split(query of head j)           # d_n and d_r numbers
        key_nope, value = split(latent_up of head j @ latent)     # d_n and d_v numbers
        score = scale * (query_nope . key_nope + turn(query_rope) . turn(key_rope))

    Rotary pairs are neighbours, channels ``2 i`` and ``2 i + 1``, as DeepSeek has them. There is
    no norm on the latent.

    Norms on query and key heads (Qwen3) cannot be folded into matrices. Then ``source`` keeps the
    projections and norms of the source; ``query`` is ``(H, d_n + d_r, d)``, applied to each
    normalised query head; ``latent_down`` is ``(r + d_r, 2 g d)``, applied to the normalised keys
    of all heads followed by their values.

    Attributes:
        query: ``(H (d_n + d_r), D)``, per head the d_n rows before the d_r; with bias or None.
        query_down: ``(q_r, D)``, a latent that queries are made from in place of the input, so that
            ``query`` is ``(H (d_n + d_r), q_r)``; or None.
        latent_down: ``(r + d_r, D)``, the r rows of the latent before the d_r; with bias or None.
        latent_up: ``(H (d_n + d_v), r)``, per head the d_n rows before the d_v.
        output: ``(D, H d_v)``, with bias or None.
        inverse_frequencies: ``(d_r / 2,)``, angle per token of each pair; repeats are allowed.
        scale: Factor on every score.
        rotary_scale: Factor on every rotated query and key, part of what ``turn`` does. The
            source's own, rather than its square in the matrices, rounds as the source does.
        window: Keys that a query sees, itself included; None for all before it.
        source: The source layer where its query and key norms stay, else None.
    """

    query: Tensor
    latent_down: Tensor
    latent_up: Tensor
    output: Tensor
    num_heads: int
    qk_nope_head_dim: int
    v_head_dim: int
    inverse_frequencies: Tensor
    scale: float
    query_bias: Tensor | None = None
    latent_down_bias: Tensor | None = None
    output_bias: Tensor | None = None
    query_down: Tensor | None = None
    rotary_scale: float = 1.0
    window: int | None = None
    source: GroupedAttentionWeights | None = None

    @property
    def kv_lora_rank(self) -> int:
        """Numbers ``r`` of the latent that is cached per token."""
        return self.latent_up.shape[1]

    @property
    def qk_rope_head_dim(self) -> int:
        """Numbers ``d_r`` of the rotary key that is cached per token."""
        return self.latent_down.shape[0] - self.kv_lora_rank


@dataclass(frozen=True)
class FactoredAttentionWeights:
    r"""One layer of ``exact`` mode: grouped attention that caches latents before the rotation.

    The latents ``key @ x`` and ``value @ x`` of ``latents``, biases included, are what is cached.
    Query head ``j`` reads rows ``j d`` to ``(j + 1) d`` of ``key_up @ latent`` and
    ``value_up @ latent``; norms of key heads, the rotation and everything else come after that, as
    in the source.

    Attributes:
        latents: A grouped layer whose ``key`` and ``value`` make the latents, ``(g d, D)``.
        key_up: ``(H d, g d)``, or None to read the latent as the ``g`` heads that it then is.
        value_up: The same for values.
    """

    latents: GroupedAttentionWeights
    key_up: Tensor | None = None
    value_up: Tensor | None = None


def with_tensors(weights: Weights, change: Callable[[str, Tensor], Tensor]) -> Weights:
    """The same layer, every tensor of it and of its source put through ``change(name, x)``."""
    changes = {}
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if isinstance(value, GroupedAttentionWeights):
            changes[field.name] = with_tensors(value, change)
        elif isinstance(value, Tensor):
            changes[field.name] = change(field.name, value)
    return dataclasses.replace(weights, **changes)
