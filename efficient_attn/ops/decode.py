"""The ops that attend to a cache: schemas, shapes and FLOPs. They have no gradient."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from efficient_attn.errors import UnsupportedError
from efficient_attn.masking import count_visible
from efficient_attn.ops import _register
from efficient_attn.ops.attention import lse_dtype

_register.define(
    "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, "
    "Tensor? block_table, Tensor? q_to_k, Tensor? q_to_v, SymInt? window_left, "
    "float scale, float softcap) -> (Tensor out, Tensor lse)"
)
_register.define(
    "mla_decode(Tensor q_latent, Tensor q_rope, Tensor cache, Tensor cache_lengths, "
    "Tensor? block_table, float scale) -> (Tensor out, Tensor lse)"
)
# Softmax attention to the selected keys alone, and how much of the weight of all keys they have.
# They are as many as top_values says or, without it, as few as leave no more than dropped_mass out.
_register.define(
    "selective_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, "
    "Tensor? block_table, Tensor? q_to_k, Tensor? q_to_v, SymInt? window_left, "
    "float scale, float softcap, SymInt? top_values, float dropped_mass) "
    "-> (Tensor out, Tensor lse, Tensor kept_mass)"
)

_PORTABLE = "efficient_attn.kernels.portable.decode"
_register.implement("attention_decode", "CompositeExplicitAutograd", f"{_PORTABLE}:decode")
_register.implement("mla_decode", "CompositeExplicitAutograd", f"{_PORTABLE}:latent_decode")
_SELECTIVE = "efficient_attn.kernels.portable.selective"
_register.implement("selective_decode", "CompositeExplicitAutograd", f"{_SELECTIVE}:decode")
if _register.TRITON_IS_INSTALLED:
    _register.implement("attention_decode", "CUDA", "efficient_attn.kernels.cuda:decode")
    _register.implement("mla_decode", "CUDA", "efficient_attn.kernels.cuda:latent_decode")
    _register.implement("selective_decode", "CUDA", "efficient_attn.kernels.cuda:selective_decode")


@_register.fake("attention_decode")
def _(query, key_cache, value_cache, *options):
    return _empty_like_heads(query, value_cache.shape[-1])


@_register.fake("mla_decode")
def _(q_latent, *options):
    return _empty_like_heads(q_latent, q_latent.shape[-1])


@_register.fake("selective_decode")
def _(query, key_cache, value_cache, *options):
    out, lse = _empty_like_heads(query, value_cache.shape[-1])
    return out, lse, torch.empty_like(lse)


def _empty_like_heads(query, dim):
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    return out, query.new_empty(batch, heads, tokens, dtype=lse_dtype(query.dtype))


def _refuse_gradient(ctx, *grads):
    raise UnsupportedError(
        "the gradient of attention to a cache",
        ["decoding is for inference"],
        "Differentiate efficient_attn.attention, which computes the same with key_lengths.",
    )


for _name in ("attention_decode", "mla_decode", "selective_decode"):
    _register.differentiate(_name, _refuse_gradient, lambda ctx, inputs, output: None)


# Lengths are values, not shapes, so these formulas look at the tensors themselves.
@register_flop_formula(torch.ops.efficient_attn.attention_decode, get_raw=True)
def _(query, key_cache, value_cache, cache_lengths, *options, out_val=None, **kwargs) -> int:
    _, heads, tokens, dim = query.shape
    return _flops(heads, tokens, dim + value_cache.shape[-1], cache_lengths, options[3])


@register_flop_formula(torch.ops.efficient_attn.mla_decode, get_raw=True)
def _(q_latent, q_rope, cache, cache_lengths, *options, out_val=None, **kwargs) -> int:
    _, heads, tokens, rank = q_latent.shape
    return _flops(heads, tokens, cache.shape[-1] + rank, cache_lengths, None)


@register_flop_formula(torch.ops.efficient_attn.selective_decode, get_raw=True)
def _(query, key_cache, value_cache, cache_lengths, *options, out_val=None, **kwargs) -> int:
    _, heads, tokens, dim = query.shape
    window_left, top_values = options[3], options[6]
    scores = _flops(heads, tokens, dim, cache_lengths, window_left)
    # How many values a mass takes depends on the scores; no more than all of them. No query sees
    # more than the last top_values keys of a window of that many.
    if top_values is not None:
        reach = top_values - 1
        window_left = reach if window_left is None else min(window_left, reach)
    return scores + _flops(heads, tokens, value_cache.shape[-1], cache_lengths, window_left)


def _flops(heads, tokens, dims, cache_lengths, window_left) -> int:
    pairs = sum(count_visible(tokens, length, window_left, 0) for length in cache_lengths.tolist())
    return 2 * heads * pairs * dims
