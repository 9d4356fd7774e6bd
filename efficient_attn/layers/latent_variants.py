"""Latent attention of converted models that DeepSeek's form cannot hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from efficient_attn.cache import LatentRows
from efficient_attn.functional import attention
from efficient_attn.head_map import HeadMap
from efficient_attn.layers.latent import MultiheadLatentAttention
from efficient_attn.layers.latent_rows import LatentLayer


class NormedLatentAttention(MultiheadLatentAttention):
    r"""Latent attention whose latent is made from normalised heads.

    Norms of query and key heads, as Qwen3 has them, depend on the data and cannot be folded into
    matrices. So the grouped heads are made first, and the latent from them::

        latent, key_rope = kv_a_proj_with_mqa([k_norm(k_proj(x)), v_proj(x)])    # all heads
        query_nope, query_rope = q_b_proj[j] @ q_norm(q_proj(x))[j]              # head j

    What is cached, and how it is attended to, is as in :class:`MultiheadLatentAttention`.

    Args:
        embed_dim: Width ``E`` of the tokens.
        num_heads: Number of query heads ``H``.
        num_kv_heads: Number of key and of value heads that the latent is made from.
        head_dim: Their width, and that of the query heads.
        q_norm, k_norm: Applied to each query and key head, for example ``nn.RMSNorm(head_dim)``.
        qkv_bias: Whether the projections to heads have a bias.
        bias: Whether the projection to the latent has one.
        kwargs: As in :class:`MultiheadLatentAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        q_norm: nn.Module,
        k_norm: nn.Module,
        qkv_bias: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(embed_dim, num_heads, latent_norm=False, **kwargs)
        self.num_kv_heads = num_kv_heads
        factory = {name: kwargs.get(name) for name in ("device", "dtype")}
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        kv_width = num_kv_heads * head_dim
        for name, out in (("q", num_heads * head_dim), ("k", kv_width), ("v", kv_width)):
            linear = nn.Linear(embed_dim, out, bias=qkv_bias, **factory)
            setattr(self, f"{name}_proj", linear)
        self.q_norm = q_norm
        self.k_norm = k_norm
        # One map of each head, one behind the other.
        self.q_b_proj = nn.Linear(head_dim, num_heads * width, bias=False, **factory)
        rows = self.kv_lora_rank + self.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(
            2 * kv_width, rows, bias=self.kv_a_proj_with_mqa.bias is not None, **factory
        )

    def project_query(self, x: Tensor) -> Tensor:
        """Queries: each normalised head through the map of its own."""
        heads = rearrange(self.q_proj(x), "b n (h d) -> b n h d", h=self.num_heads)
        maps = rearrange(self.q_b_proj.weight, "(h out) d -> h out d", h=self.num_heads)
        return einsum(self.q_norm(heads), maps, "b n h d, h out d -> b n h out").flatten(-2)

    def project_rows(self, x: Tensor) -> Tensor:
        """Latents and rotary keys of the normalised keys and the values of all heads."""
        key = rearrange(self.k_proj(x), "b n (g d) -> b n g d", g=self.num_kv_heads)
        features = torch.cat((self.k_norm(key).flatten(-2), self.v_proj(x)), -1)
        return self.kv_a_proj_with_mqa(features)


class FactoredAttention(LatentLayer):
    r"""Grouped-query attention as a latent layer that caches what comes before the rotation.

    The latents of keys and values are as wide as the grouped heads, so the cache has the size of
    theirs; ``k_up`` and ``v_up``, where present, mix them anew for every query head. Rotation comes
    after that, which is why they cannot be absorbed into the queries: each step expands all that is
    cached. A form for training with more freedom at equal cache, not for serving.

    Source: Meng et al., TransMLA: MLA Is All You Need (version 1), section 3.

    Args:
        embed_dim: Width ``E`` of the tokens.
        num_heads: Number of query heads ``H``.
        num_kv_heads: Number of grouped heads ``g`` that the latents have room for.
        head_dim: Width ``d`` of a head.
        rotary: Called as ``rotary(heads, positions)`` on query and key heads.
        scale: Factor on the scores; by default ``head_dim ** -0.5``.
        window: ``(left, right)`` keys visible beside the query's position, ``None`` for no limit.
        qkv_bias: Whether the projections to queries and latents have a bias.
        out_bias: Whether the output projection has one.
        key_up, value_up: Whether a matrix expands the latent to heads, ``(H d, g d)``; if not, it
            is read as the grouped heads.
        q_norm, k_norm: Applied to each query and key head before ``rotary``.
        device, dtype: Of the parameters.

    Shape:
        - x: ``(B, N, E)``
        - output: ``(B, N, E)``
    """

    causal = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        rotary: Callable[[Tensor, Tensor | None], Tensor],
        scale: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        key_up: bool = False,
        value_up: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rotary = rotary
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window = window
        self.q_norm = q_norm
        self.k_norm = k_norm

        def linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

        width, latent = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = linear(embed_dim, width, qkv_bias)
        self.k_proj = linear(embed_dim, latent, qkv_bias)
        self.v_proj = linear(embed_dim, latent, qkv_bias)
        self.k_up = linear(latent, width, False) if key_up else None
        self.v_up = linear(latent, width, False) if value_up else None
        self.o_proj = linear(width, embed_dim, out_bias)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Query heads, turned, and the two latents of each token, which are not."""
        query = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.num_heads)
        query = query if self.q_norm is None else self.q_norm(query)
        return self.rotary(query, positions), torch.cat((self.k_proj(x), self.v_proj(x)), -1)

    def attend(self, query: Tensor, rows: Tensor, positions: Tensor, **options: object) -> Tensor:
        """Attended heads, with keys and values expanded, normalised and turned."""
        key, value = rows.chunk(2, -1)
        key, value = self._heads(key, self.k_up), self._heads(value, self.v_up)
        key = key if self.k_norm is None else self.k_norm(key)
        key = self.rotary(key, positions)
        head_map = HeadMap.diff(self.num_heads, k=key.shape[1], v=value.shape[1])
        return attention(query, key, value, head_map=head_map, scale=self.scale, **options)

    def _heads(self, latent: Tensor, up: nn.Linear | None) -> Tensor:
        heads = latent if up is None else up(latent)
        return rearrange(heads, "b n (h d) -> b h n d", d=self.head_dim)

    @property
    def cache_rows(self) -> LatentRows:
        """What a cache for this layer keeps of a token."""
        return LatentRows(2 * self.num_kv_heads * self.head_dim, 0)

    def extra_repr(self) -> str:
        """Counts and widths."""
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}"
        )
