"""Multi-head latent attention: all heads read one short row per token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from efficient_attn.cache import LatentRows
from efficient_attn.functional import attention, mla_decode
from efficient_attn.functional.decode import FEW_TOKENS
from efficient_attn.head_map import HeadMap
from efficient_attn.layers._caching import needs_gradient
from efficient_attn.layers.latent_rows import LatentLayer, pages_of_one
from efficient_attn.layers.rotary import RotaryEmbedding


class MultiheadLatentAttention(LatentLayer):
    r"""Self-attention whose keys and values are made from a latent that all heads share.

    Of each token, ``kv_lora_rank`` numbers of latent and ``qk_rope_head_dim`` of rotary key are
    cached, for all heads together. Long inputs expand them to heads and attend as usual; a few new
    tokens behind a cache are multiplied into the latent space instead and read it as it is (the
    absorbed form). Parameters are named and shaped as in ``DeepseekV2Attention`` and
    ``DeepseekV3Attention`` of transformers, whose state dicts load here::

        layer = MultiheadLatentAttention(
            7168, 128, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64,
            qk_nope_head_dim=128, v_head_dim=128,
        )

    Source: DeepSeek-AI, DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts
    Language Model, section 2.1 and appendix C.

    Args:
        embed_dim: Width ``E`` of the tokens.
        num_heads: Number of heads ``H``.
        kv_lora_rank: Width of the latent.
        qk_rope_head_dim: Width of the rotary key, and of the part of a query that reads it; even.
        qk_nope_head_dim: Width of the part of queries and keys that is not turned; may be 0.
        v_head_dim: Width of a value head.
        q_lora_rank: Width of a latent that queries are made from; by default they are projected
            from the tokens.
        bias: Whether the projections to latents have a bias (``attention_bias``).
        out_bias: Whether the output projection has one; by default as ``bias``.
        q_bias: Whether the projection to query heads has one, which DeepSeek's never has.
        latent_norm: Whether latents are RMS normalised.
        norm_eps: Epsilon of that.
        causal: Whether a query sees only the keys up to its own position, counted from the end.
        window: ``(left, right)`` keys visible beside that position, ``None`` for no limit.
        scale: Factor on the scores; by default
            ``(qk_nope_head_dim + qk_rope_head_dim) ** -0.5``. DeepSeek multiplies it by the square
            of yarn's mscale.
        rotary: Called as ``rotary(heads, positions)``; by default an interleaved
            :class:`~efficient_attn.layers.RotaryEmbedding` of ``qk_rope_head_dim`` channels.
        device, dtype: Of the parameters.

    Shape:
        - x: ``(B, N, E)``
        - output: ``(B, N, E)``
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        qk_nope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        q_bias: bool = False,
        latent_norm: bool = True,
        norm_eps: float = 1e-6,
        causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        rotary: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            **{"embed_dim": embed_dim, "num_heads": num_heads, "kv_lora_rank": kv_lora_rank},
            **{"v_head_dim": v_head_dim, "q_lora_rank": q_lora_rank or 1},
            "qk_nope_head_dim + qk_rope_head_dim": qk_nope_head_dim + qk_rope_head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1.")
        if rotary is None and qk_rope_head_dim:
            rotary = RotaryEmbedding(qk_rope_head_dim, interleaved=True)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_rope_head_dim = qk_rope_head_dim
        self.qk_nope_head_dim = qk_nope_head_dim
        self.v_head_dim = v_head_dim
        self.q_lora_rank = q_lora_rank
        self.causal = causal
        self.window = window
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 if scale is None else scale
        self.rotary = rotary

        def linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

        def norm(width: int) -> nn.Module | None:
            kwargs = {"eps": norm_eps, "device": device, "dtype": dtype}
            return nn.RMSNorm(width, **kwargs) if latent_norm else None

        q_width = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = linear(embed_dim, q_width, q_bias)
        else:
            self.q_a_proj = linear(embed_dim, q_lora_rank, bias)
            self.q_a_layernorm = norm(q_lora_rank)
            self.q_b_proj = linear(q_lora_rank, q_width, q_bias)
        self.kv_a_proj_with_mqa = linear(embed_dim, kv_lora_rank + qk_rope_head_dim, bias)
        self.kv_a_layernorm = norm(kv_lora_rank)
        self.kv_b_proj = linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), False)
        out_bias = bias if out_bias is None else out_bias
        self.o_proj = linear(num_heads * v_head_dim, embed_dim, out_bias)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Query heads and rows, normalised and turned."""
        query, rows = self.project_query(x), self.project_rows(x)
        query = rearrange(query, "b n (h d) -> b h n d", h=self.num_heads)
        latent, key = rows.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        if self.kv_a_layernorm is not None:
            latent = self.kv_a_layernorm(latent)
        if not self.qk_rope_head_dim:
            return query, latent
        nope, rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        query = torch.cat((nope, self.rotary(rope, positions)), -1)
        return query, torch.cat((latent, self.rotary(key.unsqueeze(1), positions).squeeze(1)), -1)

    def project_query(self, x: Tensor) -> Tensor:
        """Queries ``(B, N, H (d_nope + d_rope))``, not yet turned."""
        if self.q_lora_rank is None:
            return self.q_proj(x)
        latent = self.q_a_proj(x)
        return self.q_b_proj(latent if self.q_a_layernorm is None else self.q_a_layernorm(latent))

    def project_rows(self, x: Tensor) -> Tensor:
        """Latents and rotary keys ``(B, N, kv_lora_rank + d_rope)``, neither normed nor turned."""
        return self.kv_a_proj_with_mqa(x)

    def attend(self, query: Tensor, rows: Tensor, positions: Tensor, **options: object) -> Tensor:
        """Attended heads, with rows expanded to a key and a value of each head."""
        latent, rope = rows.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        heads = rearrange(self.kv_b_proj(latent), "b n (h d) -> b h n d", h=self.num_heads)
        nope, value = heads.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        rope = rope.unsqueeze(1)
        if self.qk_nope_head_dim:
            key, head_map = torch.cat((nope, rope.expand(*nope.shape[:-1], -1)), -1), None
        else:
            key, head_map = rope, HeadMap.diff(self.num_heads, k=1, v=self.num_heads)
        return attention(query, key, value, head_map=head_map, scale=self.scale, **options)

    def can_decode(self, query: Tensor) -> bool:
        """Whether queries are few, need no gradient, and under a window alone."""
        few = query.shape[2] <= (FEW_TOKENS if self.window is None else 1)
        return self.causal and few and not needs_gradient(query)

    def decode(
        self, query: Tensor, rows: Tensor, lengths: Tensor, block_table: Tensor | None = None
    ) -> Tensor:
        """Attended heads in the absorbed form, from the rows as they lie in the cache."""
        if self.window is not None and self.window[0] is not None:
            count = self.window[0] + 1
            newest = torch.arange(count, device=rows.device)
            newest = (lengths.unsqueeze(1) - count).clamp(min=0) + newest
            rows, block_table = pages_of_one(rows, block_table, newest)
            lengths = lengths.clamp(max=count)
        up = rearrange(self.kv_b_proj.weight, "(h d) r -> h d r", h=self.num_heads)
        key_up, value_up = up.split([self.qk_nope_head_dim, self.v_head_dim], 1)
        nope, rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        latent = mla_decode(
            nope @ key_up,
            rope,
            rows,
            cache_lengths=lengths,
            block_table=block_table,
            scale=self.scale,
        )
        return latent @ value_up.mT

    @property
    def cache_rows(self) -> LatentRows:
        """What a cache for this layer keeps of a token."""
        return LatentRows(self.kv_lora_rank, self.qk_rope_head_dim)

    def extra_repr(self) -> str:
        """Widths, and what differs from the defaults."""
        names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        parts = [f"{self.embed_dim}, num_heads={self.num_heads}"]
        parts += [f"{name}={getattr(self, name)}" for name in names]
        for name, default in (("q_lora_rank", None), ("causal", True), ("window", None)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts)
