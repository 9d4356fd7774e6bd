"""HyperAttention for Hugging Face models, under a name of its own.

Importing this module registers ``efficient_attn_hyper`` with transformers, so that layers with
exact and with estimated attention can stand in one model. ``patch_model(model, attention="hyper")``
sets it up; a model loaded with ``attn_implementation="efficient_attn_hyper"`` has the default
configuration.

Steps of up to 16 tokens, which is decoding with a cache, and fewer keys than ``exact_below`` are
exact, and go to :func:`efficient_attn.integrations.transformers.attention_forward` with all that it
honours. What is estimated honours less, and the rest is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from efficient_attn.config import HyperConfig
from efficient_attn.errors import UnsupportedError
from efficient_attn.functional import hyper_attention, hyper_attention_varlen
from efficient_attn.functional.decode import FEW_TOKENS
from efficient_attn.integrations.transformers import (
    attention_forward,
    attention_mask,
    cut_to_filled,
    reasons_to_refuse,
    share_of_keys,
)
from efficient_attn.integrations.visible_spans import visible_spans

NAME = "efficient_attn_hyper"
NAME_FOR_SOME_LAYERS = "efficient_attn_hyper_some_layers"

# Where a layer keeps its choice; it has the default without one.
_ATTRIBUTE = "efficient_attn_hyper"


@dataclass(frozen=True)
class Choice:
    """How one layer estimates its attention."""

    config: HyperConfig
    seed: int

    def is_exact(self, query: Tensor, key: Tensor) -> bool:
        """Whether a call is computed without an estimate."""
        return query.shape[2] <= FEW_TOKENS or key.shape[2] < self.config.exact_below

    def __str__(self) -> str:
        return (
            f"estimated from {self.config.exact_below} keys on, "
            f"steps of up to {FEW_TOKENS} tokens (decoding) exact"
        )


def choose(module: nn.Module, config: HyperConfig, seed: int, layer: int) -> Choice:
    """Tell ``module`` how to estimate; each layer gets random numbers of its own."""
    choice = Choice(config, seed + (layer << 32))
    setattr(module, _ATTRIBUTE, choice)
    return choice


def forget(module: nn.Module) -> None:
    """Take the choice of ``module`` back."""
    vars(module).pop(_ATTRIBUTE, None)


def choice_of(module: nn.Module) -> Choice:
    """How ``module`` estimates its attention."""
    layer = getattr(module, "layer_idx", None) or 0
    return getattr(module, _ATTRIBUTE, Choice(HyperConfig(), layer << 32))


def hyper_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend as the interface of transformers asks, estimated where that is worth it.

    Args:
        module: The calling layer.
        query: ``(B, Hq, Nq, D)``.
        key: ``(B, Hk, Nk, D)``.
        value: ``(B, Hk, Nk, Dv)``.
        attention_mask: As for the exact function. What is estimated takes padding on either side,
            a cached prefix and empty places of a static cache, and reads the mask back for it.
        dropout: Must be 0.
        scaling: Factor of the scores.
        **kwargs: As for the exact function. What is estimated takes ``is_causal``, packed sequences
            and ``s_aux``.

    Returns:
        The output, ``(B, Nq, Hq, Dv)``, contiguous; and None.

    Raises:
        UnsupportedError: A call that is not exact asks for what is not done here; every such thing
            is named.
    """
    choice = choice_of(module)
    if choice.is_exact(query, key):
        return attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    return _estimated(choice, module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def hyper_attention_forward_under_sdpa_masks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args,
    **kwargs,
) -> tuple[Tensor, None]:
    """:func:`hyper_attention_forward` where the masks were made for ``sdpa`` or ``eager``."""
    if attention_mask is None:
        key, value, kwargs = cut_to_filled(module, query, key, value, kwargs)
    return hyper_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)


def _estimated(
    choice: Choice,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    reasons = reasons_to_refuse(attention_mask, dropout, kwargs)
    if sliding_window is not None and sliding_window < key.shape[2]:
        reasons.append(f"sliding_window is {sliding_window}, which is cheap and exact already")
    if softcap:
        reasons.append(f"softcap is {softcap}, which estimated scores do not have")
    if position_bias is not None:
        reasons.append("position_bias is given, which estimated scores do not have")
    packed = attention_mask is None and cu_seq_lens_q is not None
    if packed and query.shape[0] != 1:
        reasons.append("packed sequences (cu_seq_lens_q) need batch size 1")
    spans = None
    if not reasons and attention_mask is not None:
        spans = visible_spans(attention_mask, query.shape[2])
        if spans is None:
            reasons.append(
                "attention_mask is neither full nor causal with padding at the ends, and what it "
                "hides otherwise would be counted in the estimate"
            )
    if reasons:
        raise UnsupportedError(
            f"estimated attention in {type(module).__name__}",
            reasons,
            "Leave this layer out with layers=, or give it an exact_below above the "
            f"{key.shape[2]} keys of this call.",
        )
    options = {"scale": scaling, "config": choice.config, "seed": choice.seed, "return_lse": True}
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if packed:
        out, lse = hyper_attention_varlen(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            cu_seqlens_q=cu_seq_lens_q,
            cu_seqlens_k=cu_seq_lens_k,
            causal=causal,
            **options,
        )
        out, lse = out.transpose(0, 1)[None], lse.transpose(0, 1)[None]
    elif spans is None:
        out, lse = hyper_attention(query, key, value, causal=causal, **options)
    else:
        out, lse = _by_spans(query, key, value, spans, options)
    if s_aux is not None:
        out = out * share_of_keys(lse, s_aux).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _by_spans(query, key, value, spans, options: dict) -> tuple[Tensor, Tensor]:
    """One call per span, for the whole batch where all of it has the same."""
    batch, heads, tokens, _ = query.shape
    if len(set(spans)) == 1:
        spans, samples = spans[:1], [slice(None)]
    else:
        samples = [slice(i, i + 1) for i in range(batch)]
    outs, lses = [], []
    for sample, row in zip(samples, spans, strict=True):
        q, k, v = (x[sample] for x in (query, key, value))
        parts, place = [], 0
        for span in row:
            parts += [_nothing(q, v, span.first - place)] if span.first > place else []
            keys = slice(span.start, span.stop)
            rows = q[:, :, span.first : span.last]
            parts.append(
                hyper_attention(rows, k[:, :, keys], v[:, :, keys], causal=span.causal, **options)
            )
            place = span.last
        parts += [_nothing(q, v, tokens - place)] if tokens > place else []
        out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _nothing(query: Tensor, value: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The result of queries that see no key."""
    shape = (*query.shape[:2], tokens)
    lse = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_zeros(*shape, value.shape[-1]), query.new_full(shape, -torch.inf, dtype=lse)


def register() -> None:
    """Make the names known to transformers; may be called again."""
    forwards: dict[str, Callable] = {
        NAME: hyper_attention_forward,
        NAME_FOR_SOME_LAYERS: hyper_attention_forward_under_sdpa_masks,
    }
    for name, forward in forwards.items():
        AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(NAME, attention_mask)


register()
