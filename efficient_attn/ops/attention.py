"""The dense attention op: schema, shapes, gradient, autocast and FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from efficient_attn.errors import UnsupportedError
from efficient_attn.masking import count_visible
from efficient_attn.ops import _register

_MAPS_AND_MASKS = (
    "Tensor? q_to_k, Tensor? q_to_v, Tensor? bias, Tensor? key_lengths, "
    "SymInt? window_left, SymInt? window_right, float scale, float softcap"
)
_register.define(
    f"attention(Tensor query, Tensor key, Tensor value, {_MAPS_AND_MASKS})"
    " -> (Tensor out, Tensor lse)"
)
_register.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor lse, {_MAPS_AND_MASKS}, bool needs_bias_grad)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)"
)

_register.implement(
    "attention", "CompositeExplicitAutograd", "efficient_attn.kernels.portable.attention:forward"
)
_register.implement(
    "attention_backward",
    "CompositeExplicitAutograd",
    "efficient_attn.kernels.portable.attention:backward",
)
if _register.TRITON_IS_INSTALLED:
    _register.implement("attention", "CUDA", "efficient_attn.kernels.cuda:forward")
    _register.implement("attention_backward", "CUDA", "efficient_attn.kernels.cuda:backward")

# Compiled and eager code must agree on strides, so the storage order is fixed: tokens before heads,
# which is what a layer wants next, since merging the heads is then a view.


@_register.fake("attention")
def _(query, key, value, *options):
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, tokens, dtype=lse_dtype(query.dtype))


@_register.fake("attention_backward")
def _(grad_out, grad_lse, query, key, value, out, lse, q_to_k, q_to_v, bias, *options):
    needs_bias_grad = options[-1]
    grad_bias = (
        torch.empty_like(bias, memory_format=torch.contiguous_format)
        if (needs_bias_grad)
        else query.new_empty(0)
    )
    return *(empty_tokens_major(x) for x in (query, key, value)), grad_bias


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The log-sum-exp is fp32, except beside fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_tokens_major(x: Tensor) -> Tensor:
    """An uninitialised ``(B, H, N, D)`` tensor that is stored as ``(B, N, H, D)``."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _setup_context(ctx, inputs, output):
    query, key, value, q_to_k, q_to_v, bias, key_lengths, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output, q_to_k, q_to_v, bias, key_lengths)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse, q_to_k, q_to_v, bias, key_lengths = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    needs_bias_grad = bias is not None and ctx.needs_input_grad[5]
    *grads, grad_bias = torch.ops.efficient_attn.attention_backward(
        grad_out, grad_lse, query, key, value, out, lse,
        q_to_k, q_to_v, bias, key_lengths, *ctx.options, needs_bias_grad,
    )  # fmt: skip
    grad_bias = grad_bias if needs_bias_grad else None
    return *grads, None, None, grad_bias, None, *(None for _ in ctx.options)


def refuse_second_derivative(ctx, *grads):
    """The backward of a backward op."""
    raise UnsupportedError(
        "the second derivative of attention",
        ["the backward kernels are not differentiable"],
        "Differentiate efficient_attn.reference.attention instead.",
    )


_register.differentiate("attention", _backward, _setup_context)
_register.differentiate(
    "attention_backward", refuse_second_derivative, lambda ctx, inputs, output: None
)
_register.autocast("attention", num_cast=3)


def _matmul_flops(query_shape, key_shape, value_shape, left, right) -> tuple[int, int]:
    """FLOPs of one product over the query/key width, and over the value width."""
    batch, heads, nq, dim = query_shape
    scores = batch * heads * count_visible(nq, key_shape[2], left, right)
    return 2 * scores * dim, 2 * scores * value_shape[-1]


@register_flop_formula(torch.ops.efficient_attn.attention)
def _(query_shape, key_shape, value_shape, *options, out_shape=None, **kwargs) -> int:
    *_, left, right, _scale, _softcap = options
    return sum(_matmul_flops(query_shape, key_shape, value_shape, left, right))


@register_flop_formula(torch.ops.efficient_attn.attention_backward)
def _(grad_out, grad_lse, query_shape, key_shape, value_shape, *options, **kwargs) -> int:
    *_, left, right, _scale, _softcap, _needs_bias_grad = options
    over_dim, over_value_dim = _matmul_flops(query_shape, key_shape, value_shape, left, right)
    # Scores again, dQ and dK over the query/key width; dP and dV over the value width.
    return 3 * over_dim + 2 * over_value_dim
