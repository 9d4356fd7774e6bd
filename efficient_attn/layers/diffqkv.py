"""DiffQKV attention: fewer key heads than value heads, narrower keys, a stronger query."""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from efficient_attn.errors import UnsupportedError
from efficient_attn.head_map import HeadMap
from efficient_attn.layers.grouped import GroupedQueryAttention


class LinearFromZero(nn.Linear):
    """A projection that starts by giving nothing."""

    def reset_parameters(self) -> None:
        """Set all parameters to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class DiffQKVAttention(GroupedQueryAttention):
    r"""Attention with separate numbers and widths of query, key and value heads.

    A cache then holds ``num_key_heads * key_head_dim + num_value_heads * v_head_dim`` numbers of a
    token. What the smaller keys lose, the augmented query is to win back: a gated MLP between the
    query projection and the heads, which mixes all of them and costs no cache::

        q0 = q_proj(x)
        q = q_down_proj(silu(q_gate_proj(q0)) * q_up_proj(q0))        # + q0 with query_residual

    Source: Lin et al., Sigma: Differential Rescaling of Query, Key and Value for Efficient
    Language Models, arXiv 2501.13629, section 2 and appendix E.

    Args:
        embed_dim: Width ``E`` of the tokens.
        num_heads: Number of query heads ``Hq``.
        num_key_heads: Number of key heads ``Hk``; divides ``Hq``.
        num_value_heads: Number of value heads ``Hv``; divides ``Hq``, need not be a multiple of
            ``Hk``.
        head_dim: Width ``D`` of a query head, and of the others by default; by default ``E / Hq``.
        key_head_dim: Width ``Dk`` of a cached key.
        v_head_dim: Width ``Dv`` of a value.
        key_compress: How a key narrower than ``head_dim`` meets its query. ``"direct"``: the query
            has ``Dk`` channels too. ``"linear_up"``: the query has ``D``, and the key head's own
            matrix ``key_up`` widens the key; it is applied to the query instead, before both are
            turned, so that cached keys are never touched again.
        augmented_query_dim: Inner width ``A`` of the augmented query; 0 for none.
        query_residual: Add ``q0`` to the augmented query and start its last projection from zero,
            which leaves the function of a trained layer as it was. The paper has neither.
        options: Of :class:`GroupedQueryAttention`, such as ``causal``, ``rotary`` and ``bias``;
            biases are off by default, as published.

    Shape:
        - x: ``(B, N, E)``
        - output: ``(B, N, E)``

    Raises:
        ValueError: Head counts that do not divide, a width or a mode that is not accepted.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_key_heads: int,
        num_value_heads: int,
        head_dim: int | None = None,
        key_head_dim: int | None = None,
        v_head_dim: int | None = None,
        key_compress: Literal["direct", "linear_up"] = "direct",
        augmented_query_dim: int = 0,
        query_residual: bool = False,
        bias: bool = False,
        **options: object,
    ) -> None:
        head_map = HeadMap.diff(num_heads, k=num_key_heads, v=num_value_heads)
        if key_compress not in ("direct", "linear_up"):
            raise ValueError(
                f"key_compress is {key_compress!r}; it must be 'direct' or 'linear_up'."
            )
        if augmented_query_dim < 0:
            raise ValueError(
                f"augmented_query_dim is {augmented_query_dim}; pass its inner width, or 0 for a "
                "query as projected."
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}; "
                    "pass head_dim."
                )
            head_dim = embed_dim // num_heads
        key_head_dim = head_dim if key_head_dim is None else key_head_dim
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        query_dim = head_dim if key_compress == "linear_up" else key_head_dim
        rotary_dim = getattr(options.get("rotary"), "dim", 0)
        if rotary_dim > key_head_dim:
            raise ValueError(
                f"rotary turns {rotary_dim} channels and keys have {key_head_dim}; pass "
                f"RotaryEmbedding({key_head_dim}), or less."
            )
        if options.get("scale") is None:
            options["scale"] = query_dim**-0.5
        super().__init__(
            embed_dim,
            num_heads,
            head_map=head_map,
            head_dim=key_head_dim,
            v_head_dim=v_head_dim,
            bias=bias,
            **options,
        )
        factory = {name: options.get(name) for name in ("device", "dtype")}
        query_width = num_heads * query_dim
        self.query_dim = query_dim
        self.key_compress = key_compress
        self.key_up = None
        if key_compress == "linear_up":
            self.q_proj = nn.Linear(embed_dim, query_width, bias=bias, **factory)
            self.key_up = nn.Parameter(
                torch.empty(num_key_heads, query_dim, self.head_dim, **factory)
            )
        self.augmented_query_dim = augmented_query_dim
        self.query_residual = query_residual
        if augmented_query_dim:
            inner = augmented_query_dim
            self.q_gate_proj = nn.Linear(query_width, inner, bias=False, **factory)
            self.q_up_proj = nn.Linear(query_width, inner, bias=False, **factory)
            last = LinearFromZero if query_residual else nn.Linear
            self.q_down_proj = last(inner, query_width, bias=False, **factory)
        self.reset_key_up()

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``(B, Hq, N, Dk)``, key ``(B, Hk, M, Dk)`` and value ``(B, Hv, M, Dv)`` heads."""
        query = self.augment(self.q_proj(x))
        # Heads are counted by their width, for a rank may hold a part of them.
        group = self.num_heads // self.num_key_heads
        query = rearrange(query, "b n (k g d) -> b k g n d", g=group, d=self.query_dim)
        if self.key_up is not None:
            query = einsum(query, self.key_up, "b k g n up, k up d -> b k g n d")
        key = rearrange(self.k_proj(context), "b m (h d) -> b h m d", d=self.head_dim)
        value = rearrange(self.v_proj(context), "b m (h d) -> b h m d", d=self.v_head_dim)
        return query.flatten(1, 2), key, value

    def augment(self, query: Tensor) -> Tensor:
        """The augmented query, ``(B, N, width)``, from what :attr:`q_proj` gives."""
        if not self.augmented_query_dim:
            return query
        gate = nn.functional.silu(self.q_gate_proj(query))
        augmented = self.q_down_proj(gate * self.q_up_proj(query))
        return query + augmented if self.query_residual else augmented

    @torch.no_grad()
    def fold_q_proj(self) -> DiffQKVAttention:
        """Multiply the query projection into the two that follow it, for inference; returns self.

        There is nothing between them but the matrices, so the function stays and ``E * Hq * D``
        weights and one product per token go. Products are formed in fp64 and rounded once.

        Raises:
            UnsupportedError: There is no augmented query, its residual needs ``q_proj`` itself, or
                ``q_proj`` has a bias or is folded already.
        """
        bias = getattr(self.q_proj, "bias", None) is not None
        obstacles = {
            "it has no augmented query to fold into": not self.augmented_query_dim,
            "query_residual adds what q_proj gives": self.query_residual,
            "q_proj has a bias, which the folded projections have no place for": bias,
            "q_proj is folded already": isinstance(self.q_proj, nn.Identity),
        }
        reasons = [reason for reason, present in obstacles.items() if present]
        if reasons:
            raise UnsupportedError("fold_q_proj of this layer", reasons)
        weight = self.q_proj.weight
        for name in ("q_gate_proj", "q_up_proj"):
            product = getattr(self, name).weight.double() @ weight.double()
            folded = nn.Linear(*product.T.shape, bias=False, device="meta", dtype=weight.dtype)
            folded.weight = nn.Parameter(product.to(weight.dtype))
            setattr(self, name, folded)
        self.q_proj = nn.Identity()
        return self

    def reset_parameters(self) -> None:
        """Reinitialise all parameters."""
        super().reset_parameters()
        self.reset_key_up()

    def reset_key_up(self) -> None:
        """Start ``key_up``, if there is one, so that scores are as large as without it."""
        if self.key_up is not None:
            nn.init.normal_(self.key_up, std=1 / math.sqrt(self.query_dim))

    def extra_repr(self) -> str:
        """As the base class, and the augmented query."""
        parts = [super().extra_repr()]
        if self.key_up is not None:
            parts.append(f"key_compress={self.key_compress!r}")
        if self.augmented_query_dim:
            parts.append(f"augmented_query_dim={self.augmented_query_dim}")
            parts.append(f"query_residual={self.query_residual}")
        return ", ".join(parts)
