"""The HyperAttention op, a function of its inputs and a plan: schema, shapes, gradient, FLOPs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from efficient_attn.masking import count_visible
from efficient_attn.ops import _register
from efficient_attn.ops.attention import empty_tokens_major, lse_dtype, refuse_second_derivative

# The fields of efficient_attn.planning.HyperPlan, in their order.
_PLAN = (
    "Tensor key_order, Tensor key_rank, Tensor band_start, Tensor band_end, Tensor block_rows, "
    "Tensor block_first, Tensor block_sample, Tensor sample_keys, Tensor sample_log_weight, "
    "bool causal, SymInt leaf_size, SymInt window, SymInt sinks, SymInt block_size, "
    "bool samples_by_leaf"
)
_NUM_TENSORS = 9
_register.define(
    f"hyper_attention(Tensor query, Tensor key, Tensor value, {_PLAN}, float scale)"
    " -> (Tensor out, Tensor lse)"
)
_register.define(
    "hyper_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    f"Tensor value, Tensor out, Tensor lse, {_PLAN}, float scale)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)
_register.define(
    f"hyper_attention_error(Tensor query, Tensor key, Tensor lse, {_PLAN}, float scale) -> Tensor"
)
_PORTABLE = "efficient_attn.kernels.portable.hyper"
_register.implement("hyper_attention", "CompositeExplicitAutograd", f"{_PORTABLE}:forward")
_register.implement(
    "hyper_attention_backward", "CompositeExplicitAutograd", f"{_PORTABLE}:backward"
)
if _register.TRITON_IS_INSTALLED:
    _CUDA = "efficient_attn.kernels.cuda"
    _register.implement("hyper_attention", "CUDA", f"{_CUDA}:forward_hyper")
    _register.implement("hyper_attention_backward", "CUDA", f"{_CUDA}:backward_hyper")

_register.implement(
    "hyper_attention_error", "CompositeExplicitAutograd", f"{_PORTABLE}_error:error"
)


@_register.fake("hyper_attention_error")
def _(query, key, lse, *options):
    return torch.empty_like(lse)


@_register.fake("hyper_attention")
def _(query, key, value, *options):
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, tokens, dtype=lse_dtype(query.dtype))


@_register.fake("hyper_attention_backward")
def _(grad_out, grad_lse, query, key, value, *options):
    return tuple(empty_tokens_major(x) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, *plan_and_scale = inputs
    tensors, ctx.numbers = plan_and_scale[:_NUM_TENSORS], plan_and_scale[_NUM_TENSORS:]
    ctx.save_for_backward(query, key, value, *output, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.efficient_attn.hyper_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, *tensors, *ctx.numbers
    )
    return *grads, *(None for _ in (*tensors, *ctx.numbers))


_register.differentiate("hyper_attention", _backward, _setup_context)
_register.differentiate(
    "hyper_attention_backward", refuse_second_derivative, lambda ctx, inputs, output: None
)
_register.autocast("hyper_attention", num_cast=3)


def _matmul_flops(query, key, value, plan) -> tuple[int, int]:
    """FLOPs of one product over the query/key width, and over the value width.

    Every place of a block tile is counted, filled or not, as dense hardware computes it.
    """
    *_, block_rows, _, _, samples, _, causal, leaf, window, sinks, block, by_leaf = plan
    batch, heads, nq, dim = query
    nk, drawn = key[2], samples[-1]
    near = 0
    for start in range(nk - nq, nk, leaf) if leaf else ():
        begin = max(start // leaf * leaf - window, 0)
        rows = min(leaf, nk - start)
        end = start + rows if causal else min(start + rows + window, nk)
        near += count_visible(rows, max(end - begin, 0), None, 0 if causal else None)
    if by_leaf:
        near += nq * (sinks + drawn)
    tiles = block_rows[2] * block_rows[3] * (block + (0 if by_leaf else drawn))
    scores = batch * (heads * near + key[1] * tiles)
    return 2 * scores * dim, 2 * scores * value[-1]


@register_flop_formula(torch.ops.efficient_attn.hyper_attention)
def _(query, key, value, *plan_and_scale, out_shape=None, **kwargs) -> int:
    return sum(_matmul_flops(query, key, value, plan_and_scale[:-1]))


@register_flop_formula(torch.ops.efficient_attn.hyper_attention_backward)
def _(grad_out, grad_lse, query, key, value, out, lse, *plan_and_scale, **kwargs) -> int:
    over_dim, over_value_dim = _matmul_flops(query, key, value, plan_and_scale[:-1])
    return 3 * over_dim + 2 * over_value_dim
