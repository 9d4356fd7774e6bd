"""HyperAttention as a layer."""

from __future__ import annotations

from torch import Tensor

from efficient_attn.config import HyperConfig
from efficient_attn.errors import UnsupportedError
from efficient_attn.functional import attention, hyper_attention
from efficient_attn.functional.decode import FEW_TOKENS
from efficient_attn.head_map import HeadMap
from efficient_attn.layers.grouped import GroupedQueryAttention


class HyperAttention(GroupedQueryAttention):
    """A :class:`GroupedQueryAttention` that represents most keys by a weighted sample.

    It has the same parameters, so the state dict of one loads into the other. What is random is a
    function of ``seed``, of the head and of the place in the sequence, so activation checkpointing,
    saving and loading, and a second call repeat the bits.

    **It is exact** for fewer keys than ``config.exact_below``, and for up to 16 queries at a time,
    which is how a cache is decoded; longer prompts behind a cache are estimated.
    :meth:`is_exact` tells. With ``config.max_error``, heads that are less certain than it are exact
    too, and ``exact_heads`` is how many of ``B * num_heads`` were so in the last estimated call.

    Source: Han et al., HyperAttention, arXiv 2310.05869.

    Args:
        embed_dim: Width ``E`` of the tokens.
        num_heads: Number of query heads.
        config: How keys are chosen.
        seed: Fixes everything random. Give each layer of a model its own.
        options: Of :class:`GroupedQueryAttention`, such as ``num_kv_heads``, ``causal`` and
            ``rotary``; not ``window`` and ``softcap``.

    Shape:
        - x: ``(B, N, E)``
        - context: ``(B, M, E)``
        - output: ``(B, N, E)``

    Raises:
        UnsupportedError: ``window`` or ``softcap`` is set, or a call that is not exact is given a
            ``bias``; padding behind the keys is told by ``key_lengths``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        config: HyperConfig | None = None,
        seed: int = 0,
        **options: object,
    ) -> None:
        refused = [
            f"{name} is {options[name]}" for name in ("window", "softcap") if options.get(name)
        ]
        if refused:
            raise UnsupportedError(
                "HyperAttention",
                refused,
                "GroupedQueryAttention has both, and a window needs no estimate.",
            )
        super().__init__(embed_dim, num_heads, **options)
        self.config = HyperConfig() if config is None else config
        if not isinstance(self.config, HyperConfig):
            raise TypeError(f"config is a {type(config).__name__}; pass a HyperConfig.")
        self.seed = seed
        # A tensor after the first such call, which nobody has to wait for.
        self.exact_heads: Tensor | None = None

    def is_exact(self, num_queries: int, num_keys: int) -> bool:
        """Whether a call with so many tokens is computed without an estimate."""
        return num_queries <= FEW_TOKENS or num_keys < self.config.exact_below

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        head_map: HeadMap,
        causal: bool,
        scale: float | None,
        bias: Tensor | None,
        key_lengths: Tensor | None,
        **exact_only: object,
    ) -> Tensor:
        """Attended heads, estimated unless :meth:`is_exact` says otherwise."""
        options = {
            "head_map": head_map,
            "causal": causal,
            "scale": scale,
            "key_lengths": key_lengths,
        }
        if self.is_exact(query.shape[2], key.shape[2]):
            return attention(query, key, value, bias=bias, **options, **exact_only)
        if bias is not None:
            raise UnsupportedError(
                "HyperAttention",
                [f"bias is given, and {key.shape[2]} keys are estimated, which has no bias"],
                "Tell padding by key_lengths, or raise config.exact_below.",
            )
        options |= {"config": self.config, "seed": self.seed}
        if self.config.max_error is None:
            return hyper_attention(query, key, value, **options)
        out, error = hyper_attention(query, key, value, return_error=True, **options)
        self.exact_heads = (error == 0).all(-1).sum()
        return out

    def extra_repr(self) -> str:
        """That of the exact layer, the seed, and what the configuration changes."""
        return f"{super().extra_repr()}, seed={self.seed}, config={self.config}"
