"""Flash-attention backward for any head map, dense and packed: no atomics, so it is repeatable.

One kernel owns blocks of queries, one owns blocks of keys and values, and one owns tiles of the
bias. Each recomputes the softmax weights from the log-sum-exp.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efficient_attn.kernels.triton import (
    attention_grad_bias,
    attention_grad_key_value,
    attention_grad_query,
    attention_grad_rows,
)
from efficient_attn.kernels.triton._arguments import Problem


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    q_to_k: Tensor | None,
    q_to_v: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    window_left: int | None,
    window_right: int | None,
    scale: float,
    softcap: float,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention_fwd.forward`.

    Returns:
        Those of query, key and value, stored tokens-major, and that of the bias in its own shape,
        which is empty if not asked for.
    """
    problem = Problem(
        query, key, value, q_to_k, q_to_v, window_left, window_right, scale, softcap,
        bias=bias, key_lengths=key_lengths,
    )  # fmt: skip
    *grads, arguments = _gradients(problem, grad_out, grad_lse, out, lse)
    if needs_bias_grad:
        return *grads, attention_grad_bias.launch(problem, arguments)
    return *grads, query.new_empty(0)


def backward_varlen(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_to_k: Tensor | None,
    q_to_v: Tensor | None,
    window_left: int | None,
    window_right: int | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention_fwd.forward_varlen`: those of query, key and value."""
    problem = Problem(
        query, key, value, q_to_k, q_to_v, window_left, window_right, scale, softcap,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    *grads, _ = _gradients(problem, grad_out, grad_lse, out, lse)
    return tuple(grads)


def _gradients(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Gradients of query, key and value, and the arguments that gave them."""
    arguments = problem.kernel_arguments()
    arguments |= attention_grad_rows.launch(problem, arguments, grad_out, grad_lse, out, lse)
    tensors = (problem.query, problem.key, problem.value)
    grad_query, grad_key, grad_value = (problem.allocate(x, x.shape[-1]) for x in tensors)
    attention_grad_query.launch(problem, arguments, grad_query)
    attention_grad_key_value.launch(problem, arguments, grad_key, grad_value)
    return grad_query, grad_key, grad_value, arguments
