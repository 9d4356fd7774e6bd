"""Attention with any number of key and value heads, and any map from query heads to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from efficient_attn.cache import KeyValueRows, SequenceCache
from efficient_attn.errors import ConversionError
from efficient_attn.functional import attention, attention_decode
from efficient_attn.functional.decode import FEW_TOKENS
from efficient_attn.head_map import HeadMap
from efficient_attn.layers._caching import check_cache_arguments, needs_gradient

MAP_NAMES = ("q_to_k", "q_to_v")


class GroupedQueryAttention(nn.Module):
    r"""Self- or cross-attention in which query heads share key and value heads.

    One layer for the whole family, told apart by counts or by a map alone::

        GroupedQueryAttention(512, 8)                                  # multi-head
        GroupedQueryAttention(512, 8, num_kv_heads=1)                  # multi-query
        GroupedQueryAttention(512, 8, num_kv_heads=2)                  # grouped-query, even groups
        GroupedQueryAttention(512, 8, head_map=HeadMap.from_group_sizes([5, 2, 1]))
        GroupedQueryAttention(512, 8, head_map=HeadMap.diff(8, k=2, v=4))

    Source: Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, section 2.2.

    Args:
        embed_dim: Width ``E`` of the tokens.
        num_heads: Number of query heads ``Hq``.
        num_kv_heads: Number of key and value heads in even groups; by default ``num_heads``.
        head_map: Any other arrangement, instead of ``num_kv_heads``. Explicit indices become the
            buffers ``q_to_k`` and ``q_to_v``: they follow the module's device and are saved in its
            state dict. Even groups add no buffer.
        head_dim: Width ``D`` of query and key heads; by default ``embed_dim / num_heads``.
        v_head_dim: Width ``Dv`` of value heads; by default ``head_dim``.
        bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the output projection has one; by default as ``bias``.
        causal: Whether a query sees only the keys up to its own position, counted from the end.
        window: ``(left, right)`` keys visible beside that position, ``None`` for no limit.
        scale: Factor on the scores; by default ``head_dim ** -0.5``.
        softcap: Bound ``c`` of scores ``c * tanh(score / c)``; 0 for none.
        top_values: Decode with the values of so many largest weights alone, as
            :func:`efficient_attn.attention_decode` does; prompts and training stay exact.
        rotary: Called as ``rotary(x, positions)`` on query and key heads, for example a
            :class:`~efficient_attn.layers.RotaryEmbedding`.
        q_norm, k_norm: Applied to each query and key head before ``rotary``, for example
            ``nn.RMSNorm(head_dim)``.
        q_proj, k_proj, v_proj, o_proj: Modules to use in place of ``nn.Linear``: adapters,
            quantised layers, or projections from a context of another width.
        device, dtype: Of the projections that are built here.

    Shape:
        - x: ``(B, N, E)``
        - context: ``(B, M, E)``
        - output: ``(B, N, E)``

    To build on this layer, override a step of ``forward``: :meth:`project`,
    :meth:`choose_head_map`, :meth:`attend` or :meth:`combine`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_map: HeadMap | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        top_values: int | None = None,
        rotary: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        q_proj: nn.Module | None = None,
        k_proj: nn.Module | None = None,
        v_proj: nn.Module | None = None,
        o_proj: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_map is None:
            head_map = HeadMap.gqa(num_heads, num_heads if num_kv_heads is None else num_kv_heads)
        elif num_kv_heads is not None:
            raise ValueError("pass num_kv_heads for even groups or head_map for any, not both.")
        elif head_map.num_q_heads != num_heads:
            raise ValueError(
                f"head_map is for {head_map.num_q_heads} query heads and num_heads is {num_heads}."
            )
        if top_values is not None and top_values < 1:
            raise ValueError(
                f"top_values is {top_values}; pass at least 1, or None to read all values."
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}; "
                    "pass head_dim."
                )
            head_dim = embed_dim // num_heads

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_key_heads = head_map.num_k_heads
        self.num_value_heads = head_map.num_v_heads
        self.head_dim = head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.causal = causal
        self.window = window
        self.scale = scale
        self.softcap = softcap
        self.top_values = top_values
        self.rotary = rotary
        self.q_norm = q_norm
        self.k_norm = k_norm

        q_width = num_heads * head_dim
        k_width = self.num_key_heads * head_dim
        v_width = self.num_value_heads * self.v_head_dim
        out_bias = bias if out_bias is None else out_bias
        kwargs = {"device": device, "dtype": dtype}
        self.q_proj = _projection("q_proj", q_proj, embed_dim, q_width, bias, kwargs)
        self.k_proj = _projection("k_proj", k_proj, embed_dim, k_width, bias, kwargs)
        self.v_proj = _projection("v_proj", v_proj, embed_dim, v_width, bias, kwargs)
        o_width = num_heads * self.v_head_dim
        self.o_proj = _projection("o_proj", o_proj, o_width, embed_dim, out_bias, kwargs)

        self._initial_head_map = head_map
        device = torch.get_default_device() if device is None else device
        for name in MAP_NAMES:
            index = getattr(head_map, name)
            # Copied, because both may be one tensor, which some checkpoint formats refuse.
            self.register_buffer(name, None if index is None else index.to(device, copy=True))

    @classmethod
    def from_mha(cls, module: nn.MultiheadAttention, **kwargs: object) -> GroupedQueryAttention:
        """The same self-attention as ``module``, with copies of its weights.

        Args:
            module: A layer with equal widths, without dropout, ``add_bias_kv``, ``add_zero_attn``.
            kwargs: Constructor arguments such as ``causal``.

        Raises:
            ConversionError: ``module`` does what this layer cannot; every reason is named.
        """
        obstacles = {
            "kdim or vdim differs from embed_dim": module.in_proj_weight is None,
            f"dropout is {module.dropout}": module.dropout > 0.0,
            "add_bias_kv is set": module.bias_k is not None,
            "add_zero_attn is set": module.add_zero_attn,
        }
        reasons = [reason for reason, present in obstacles.items() if present]
        if reasons:
            raise ConversionError(
                f"MultiheadAttention cannot become GroupedQueryAttention: {'; '.join(reasons)}. "
                "efficient_attn.layers.MultiheadAttention takes all of its options."
            )
        state = {f"o_proj.{kind}": x for kind, x in module.out_proj.state_dict().items()}
        weight, bias = module.in_proj_weight, module.in_proj_bias
        state |= {f"{x}_proj.weight": w for x, w in zip("qkv", weight.chunk(3), strict=True)}
        if bias is not None:
            state |= {f"{x}_proj.bias": b for x, b in zip("qkv", bias.chunk(3), strict=True)}
        kwargs |= {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        layer = cls(module.embed_dim, module.num_heads, **kwargs)
        layer.load_state_dict(state)
        return layer.train(module.training)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
        key_lengths: Tensor | None = None,
        bias: Tensor | None = None,
        head_map: HeadMap | None = None,
        cache: SequenceCache | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend from ``x`` to ``context``, to ``x`` itself, or to a cache that ``x`` is added to.

        Args:
            x: ``(B, N, E)``.
            context: ``(B, M, E)``; by default ``x``.
            positions: Position of each token of ``x`` for ``rotary``, ``(N,)`` or ``(B, N)``.
            context_positions: The same for ``context``.
            key_lengths: How many leading tokens of the context each sample has, int ``(B,)``.
            bias: Added to the scores, broadcastable to ``(B, Hq, N, M)``; ``-inf`` masks.
            head_map: Replaces the layer's own map in this call; ``(B, Hq)`` indices give every
                sample its own.
            cache: What came before ``x`` in each sequence, holding :attr:`cache_rows`; keys and
                values of ``x`` are appended. By default, positions go on from there. It holds no
                graph, so tokens whose keys or values need a gradient are refused.
            counts: With a cache, how many tokens of ``x`` each sequence has: the last ones, and
                padding before them, whose output means nothing. By default all.
        """
        check_cache_arguments(
            cache, counts, self.causal, {"context": context, "key_lengths": key_lengths}
        )
        for name, tokens in (("x", x), ("context", context)):
            if tokens is not None and tokens.dim() != 3:
                raise ValueError(
                    f"{name} has shape {tuple(tokens.shape)}; it must be (batch, tokens, width)."
                )
        query, key, value = self.project(x, x if context is None else context)
        if head_map is None:
            head_map = self.choose_head_map(query, key, value, key_lengths)
        if context is None:
            if cache is not None and positions is None and self.rotary is not None:
                positions = cache.positions(x.shape[1], counts)
            context_positions = positions
        query = self._normalise_and_turn(query, self.q_norm, positions)
        key = self._normalise_and_turn(key, self.k_norm, context_positions)
        options = {
            "head_map": head_map,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
        }
        if cache is not None:
            cache.append(key, value, counts=counts)
            if bias is None and query.shape[2] <= FEW_TOKENS and not needs_gradient(query):
                places = {"cache_lengths": cache.lengths, "block_table": cache.block_table}
                options |= {"top_values": self.top_values, **places}
                return self.combine(attention_decode(query, *cache.parts, **options))
            key, value = cache.filled()
            key_lengths = cache.lengths if cache.is_ragged else None
        options |= {"causal": self.causal, "bias": bias, "key_lengths": key_lengths}
        return self.combine(self.attend(query, key, value, **options))

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``(B, Hq, N, D)``, key ``(B, Hk, M, D)`` and value ``(B, Hv, M, Dv)`` heads."""
        query = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.num_heads)
        key = rearrange(self.k_proj(context), "b m (h d) -> b h m d", h=self.num_key_heads)
        value = rearrange(self.v_proj(context), "b m (h d) -> b h m d", h=self.num_value_heads)
        return query, key, value

    def choose_head_map(
        self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None
    ) -> HeadMap:
        """The map of this call, given the heads as projected; here the layer's own."""
        return self.head_map

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        """Attended heads ``(B, Hq, N, Dv)``, by default those of :func:`efficient_attn.attention`.

        Not called for a few new tokens behind a cache, which are decoded.
        """
        return attention(query, key, value, **options)

    def combine(self, out: Tensor) -> Tensor:
        """From attended heads ``(B, Hq, N, Dv)`` to tokens ``(B, N, E)``."""
        return self.o_proj(rearrange(out, "b h n d -> b n (h d)"))

    def _normalise_and_turn(
        self, heads: Tensor, norm: nn.Module | None, positions: Tensor | None
    ) -> Tensor:
        heads = heads if norm is None else norm(heads)
        return heads if self.rotary is None else self.rotary(heads, positions)

    @property
    def head_map(self) -> HeadMap:
        """The layer's own head map."""
        counts = (self.num_heads, self.num_key_heads, self.num_value_heads)
        return HeadMap(*counts, q_to_k=self.q_to_k, q_to_v=self.q_to_v)

    @property
    def cache_rows(self) -> KeyValueRows:
        """What a cache for this layer keeps of a token."""
        return KeyValueRows.for_map(self.head_map, self.head_dim, self.v_head_dim)

    def reset_parameters(self) -> None:
        """Reinitialise projections and norms, and restore the head map given at construction."""
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name in self._map_names():
            getattr(self, name).copy_(getattr(self._initial_head_map, name))

    def _map_names(self) -> list[str]:
        """The indices that are explicit, and so are buffers."""
        return [name for name in MAP_NAMES if getattr(self, name) is not None]

    def extra_repr(self) -> str:
        """Counts, widths, what differs from the defaults, and an explicit map."""
        parts = [
            f"{self.embed_dim}, num_heads={self.num_heads}, key_heads={self.num_key_heads}",
            f"value_heads={self.num_value_heads}, head_dim={self.head_dim}",
        ]
        if self.v_head_dim != self.head_dim:
            parts.append(f"v_head_dim={self.v_head_dim}")
        defaults = {
            "causal": False,
            "window": None,
            "scale": None,
            "softcap": 0,
            "top_values": None,
        }
        for name, default in {**defaults, "top_values": None}.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        for name in self._map_names():
            buffer = getattr(self, name)
            parts.append(f"{name}={'meta' if buffer.is_meta else buffer.tolist()}")
        return ", ".join(parts)


def _projection(
    name: str,
    given: nn.Module | None,
    in_features: int,
    out_features: int,
    bias: bool,
    kwargs: dict[str, object],
) -> nn.Module:
    if given is None:
        return nn.Linear(in_features, out_features, bias=bias, **kwargs)
    width = getattr(given, "out_features", out_features)
    if width != out_features:
        raise ValueError(
            f"{name} produces {width} features; these head counts and widths need {out_features}."
        )
    return given
