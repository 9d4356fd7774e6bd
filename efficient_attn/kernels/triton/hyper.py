"""HyperAttention in Triton: gathers inside of the kernels, a fixed number of launches.

How many there are depends neither on the depth of the causal recursion nor on the data. Nothing is
added atomically, so results are repeatable to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficient_attn.kernels.triton import (
    attention_grad_rows,
    configs,
    hyper_blocks,
    hyper_grad_blocks,
    hyper_grad_near,
    hyper_grad_samples,
    hyper_leaves,
)
from efficient_attn.kernels.triton._arguments import Problem
from efficient_attn.kernels.triton._hyper_arguments import HyperProblem, KeyGradients

_BACKWARD_ONLY = ("grad_out", "grad_out_strides", "delta", "log2_lse", "padded_queries")


def forward(query: Tensor, key: Tensor, value: Tensor, *plan_and_scale) -> tuple[Tensor, Tensor]:
    """The ``hyper_attention`` op.

    Returns:
        out ``(B, Hq, Nq, Dv)``, stored tokens-major, and lse ``(B, Hq, Nq)``, fp32, natural log.
    """
    problem = HyperProblem.of(query, key, value, *plan_and_scale)
    out = problem.allocate(query, value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    for samples, q_heads, _, part in problem.parts():
        arguments = part.kernel_arguments() | dict.fromkeys(_BACKWARD_ONLY)
        _walk_rows(part, arguments, out[samples, q_heads], lse[samples, q_heads])
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query, key, value, out, lse, *plan_and_scale
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``hyper_attention_backward`` op: gradients of query, key and value, tokens-major.

    Given the merged output and log-sum-exp, the weights of every part are those of the whole.
    """
    problem = HyperProblem.of(query, key, value, *plan_and_scale)
    grads = tuple(problem.allocate(x, x.shape[-1]) for x in (query, key, value))
    together = query.shape[-1] + value.shape[-1] <= configs.LARGEST_DIMS_TOGETHER
    for samples, q_heads, k_heads, part in problem.parts():
        part_out, part_lse, part_grad_out = (x[samples, q_heads] for x in (out, lse, grad_out))
        part_grad_lse = None if grad_lse is None else grad_lse[samples, q_heads]
        arguments = part.kernel_arguments() | attention_grad_rows.launch(
            part, Problem.kernel_arguments(part), part_grad_out, part_grad_lse, part_out, part_lse
        )
        _walk_rows(part, arguments, grads[0][samples, q_heads], None)
        grad_key, grad_value = (x[samples, k_heads] for x in grads[1:])
        if together:
            _walk_keys(part, arguments, KeyGradients(grad_key, grad_value))
        else:
            _walk_keys(part, arguments, KeyGradients(grad_key, None))
            _walk_keys(part, arguments, KeyGradients(None, grad_value))
    return grads


def _walk_rows(
    problem: HyperProblem, arguments: dict[str, Any], out: Tensor, lse: Tensor | None
) -> None:
    """Fill in output and log-sum-exp, or the gradient of the queries."""
    if not problem.has_leaves:
        # Every row is in one block tile, which gives the result.
        hyper_blocks.launch(problem, arguments, out, lse, problem.num_queries)
        return
    width, of_blocks = problem.query_width(), None
    if problem.num_levels:
        of_blocks = problem.workspace(out.shape[-1])
        hyper_blocks.launch(problem, arguments, *of_blocks, width)
    hyper_leaves.launch(problem, arguments, out, lse, of_blocks, width)


def _walk_keys(problem: HyperProblem, arguments: dict[str, Any], grads: KeyGradients) -> None:
    """Fill in the gradients of keys and values."""
    of_blocks = hyper_grad_blocks.launch(problem, arguments, grads)
    of_samples = hyper_grad_samples.launch(problem, arguments, grads)
    hyper_grad_near.launch(problem, arguments, grads, of_blocks, *of_samples)
