"""The op that merges partial attention results: schema, shapes and gradient."""

from __future__ import annotations

import torch

from efficient_attn.ops import _register

_register.define("merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)")
_register.implement(
    "merge_states", "CompositeExplicitAutograd", "efficient_attn.kernels.portable.merge:merge"
)


@_register.fake("merge_states")
def _(outs, lses):
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _setup_context(ctx, inputs, output):
    outs, lses = inputs
    ctx.num_parts = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    # Read once: under checkpointing what was saved can be had a single time.
    *parts, out, lse = ctx.saved_tensors
    outs, lses = parts[: ctx.num_parts], parts[ctx.num_parts :]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    # d out / d lse_s = w_s (out_s - out) and d lse / d lse_s = w_s, with w_s = exp(lse_s - lse).
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    grad_outs, grad_lses = [], []
    for part, part_lse in zip(outs, lses, strict=True):
        weight = torch.exp(part_lse - finite_lse)
        toward = ((part - out).to(weight.dtype) * grad_out).sum(-1)
        grad_outs.append((weight.unsqueeze(-1) * grad_out).to(part.dtype))
        grad_lses.append((weight * (toward + grad_lse)).to(part_lse.dtype))
    return grad_outs, grad_lses


_register.differentiate("merge_states", _backward, _setup_context)
