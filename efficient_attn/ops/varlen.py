"""The attention op over packed sequences: schema, shapes, gradient, autocast and FLOPs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from efficient_attn.masking import count_visible
from efficient_attn.ops import _register
from efficient_attn.ops.attention import lse_dtype, refuse_second_derivative

_PACKING_AND_MAPS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? q_to_k, Tensor? q_to_v, SymInt? window_left, SymInt? window_right, "
    "float scale, float softcap"
)
_register.define(
    f"attention_varlen(Tensor query, Tensor key, Tensor value, {_PACKING_AND_MAPS})"
    " -> (Tensor out, Tensor lse)"
)
_register.define(
    "attention_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    f"Tensor value, Tensor out, Tensor lse, {_PACKING_AND_MAPS})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)

_PORTABLE = "efficient_attn.kernels.portable.attention"
_register.implement("attention_varlen", "CompositeExplicitAutograd", f"{_PORTABLE}:forward_varlen")
_register.implement(
    "attention_varlen_backward", "CompositeExplicitAutograd", f"{_PORTABLE}:backward_varlen"
)
if _register.TRITON_IS_INSTALLED:
    _CUDA = "efficient_attn.kernels.cuda"
    _register.implement("attention_varlen", "CUDA", f"{_CUDA}:forward_varlen")
    _register.implement("attention_varlen_backward", "CUDA", f"{_CUDA}:backward_varlen")


@_register.fake("attention_varlen")
def _(query, key, value, *options):
    tokens, heads, _ = query.shape
    out = query.new_empty(tokens, heads, value.shape[-1])
    return out, query.new_empty(tokens, heads, dtype=lse_dtype(query.dtype))


@_register.fake("attention_varlen_backward")
def _(grad_out, grad_lse, query, key, value, *options):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, cu_q, cu_k, max_q, max_k, q_to_k, q_to_v, *ctx.options = inputs
    ctx.lengths = (max_q, max_k)
    ctx.save_for_backward(query, key, value, *output, cu_q, cu_k, q_to_k, q_to_v)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse, cu_q, cu_k, q_to_k, q_to_v = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.efficient_attn.attention_varlen_backward(
        grad_out, grad_lse, query, key, value, out, lse,
        cu_q, cu_k, *ctx.lengths, q_to_k, q_to_v, *ctx.options,
    )  # fmt: skip
    return *grads, *(None for _ in range(6)), *(None for _ in ctx.options)


_register.differentiate("attention_varlen", _backward, _setup_context)
_register.differentiate(
    "attention_varlen_backward", refuse_second_derivative, lambda ctx, inputs, output: None
)
_register.autocast("attention_varlen", num_cast=3)


def _matmul_flops(query, value, cu_q, cu_k, left, right) -> tuple[int, int]:
    lengths_q, lengths_k = (x.diff().tolist() for x in (cu_q, cu_k))
    scores = query.shape[1] * sum(
        count_visible(nq, nk, left, right) for nq, nk in zip(lengths_q, lengths_k, strict=True)
    )
    return 2 * scores * query.shape[-1], 2 * scores * value.shape[-1]


# Packed lengths are values, not shapes, so these formulas look at the tensors themselves.
@register_flop_formula(torch.ops.efficient_attn.attention_varlen, get_raw=True)
def _(query, key, value, cu_q, cu_k, *options, out_val=None, **kwargs) -> int:
    *_, left, right, _scale, _softcap = options
    return sum(_matmul_flops(query, value, cu_q, cu_k, left, right))


@register_flop_formula(torch.ops.efficient_attn.attention_varlen_backward, get_raw=True)
def _(grad_out, grad_lse, query, key, value, out, lse, cu_q, cu_k, *options, **kwargs) -> int:
    *_, left, right, _scale, _softcap = options
    over_dim, over_value_dim = _matmul_flops(query, value, cu_q, cu_k, left, right)
    return 3 * over_dim + 2 * over_value_dim
