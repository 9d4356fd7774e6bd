"""What runs where nothing better is built: torch's flash op on CPU, blocked ATen elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from efficient_attn.kernels.conventions import accumulator
from efficient_attn.kernels.portable import blocked, flash_cpu


def forward(
    query, key, value, q_to_k, q_to_v, bias, key_lengths, window_left, window_right, scale, softcap
) -> tuple[Tensor, Tensor]:
    """The ``attention`` op."""
    arguments = (query, key, value, q_to_k, q_to_v, bias, key_lengths, window_left, window_right)
    if query.numel() == 0 or key.shape[2] == 0:
        return flash_cpu.blind(query, value.shape[-1])
    if query.device.type == "cpu" and not flash_cpu.refusals(softcap, None, False):
        return flash_cpu.forward(*arguments, scale)
    return blocked.forward(*arguments, scale, softcap)


def backward(
    grad_out, grad_lse, query, key, value, out, lse, q_to_k, q_to_v, bias, key_lengths,
    window_left, window_right, scale, softcap, needs_bias_grad,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The ``attention_backward`` op."""
    tensors = (query, key, value, out, lse, q_to_k, q_to_v, bias, key_lengths)
    window = (window_left, window_right)
    if query.numel() == 0 or key.shape[2] == 0:
        grad_bias = bias.new_zeros(bias.shape) if needs_bias_grad else query.new_empty(0)
        return *(_zeros_tokens_major(x) for x in (query, key, value)), grad_bias
    if query.device.type == "cpu" and not flash_cpu.refusals(softcap, grad_lse, needs_bias_grad):
        grads = flash_cpu.backward(grad_out, *tensors, *window, scale)
        return *grads, query.new_empty(0)
    return blocked.backward(grad_out, grad_lse, *tensors, *window, scale, softcap, needs_bias_grad)


def forward_varlen(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    q_to_k, q_to_v, window_left, window_right, scale, softcap,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ``attention_varlen`` op, one sequence after the other."""
    tokens, heads, _ = query.shape
    out = query.new_zeros(tokens, heads, value.shape[-1])
    lse_dtype = accumulator(query.dtype)
    lse = query.new_full((tokens, heads), -torch.inf, dtype=lse_dtype)
    options = (None, None, window_left, window_right, scale, softcap)
    for i, (q_tokens, k_tokens) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        maps = (_row(x, i) for x in (q_to_k, q_to_v))
        dense = (_dense(query[q_tokens]), _dense(key[k_tokens]), _dense(value[k_tokens]))
        sequence_out, sequence_lse = forward(*dense, *maps, *options)
        out[q_tokens] = sequence_out[0].transpose(0, 1)
        lse[q_tokens] = sequence_lse[0].transpose(0, 1)
    return out, lse


def backward_varlen(
    grad_out, grad_lse, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_q, max_seqlen_k, q_to_k, q_to_v, window_left, window_right, scale, softcap,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The ``attention_varlen_backward`` op."""
    totals = tuple(x.new_zeros(x.shape) for x in (query, key, value))
    options = (None, None, window_left, window_right, scale, softcap, False)
    for i, (q_tokens, k_tokens) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        *grads, _ = backward(
            _dense(grad_out[q_tokens]),
            None if grad_lse is None else grad_lse[q_tokens].transpose(0, 1)[None],
            *(_dense(query[q_tokens]), _dense(key[k_tokens]), _dense(value[k_tokens])),
            _dense(out[q_tokens]),
            lse[q_tokens].transpose(0, 1)[None],
            *(_row(x, i) for x in (q_to_k, q_to_v)),
            *options,
        )
        places = (q_tokens, k_tokens, k_tokens)
        for total, place, grad in zip(totals, places, grads, strict=True):
            total[place] = grad[0].transpose(0, 1)
    return totals


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        yield slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])


def _dense(packed: Tensor) -> Tensor:
    """``(tokens, heads, dim)`` as a dense batch of one."""
    return packed.transpose(0, 1).unsqueeze(0)


def _row(index: Tensor | None, sequence: int) -> Tensor | None:
    return index[sequence] if index is not None and index.dim() == 2 else index


def _zeros_tokens_major(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x.new_zeros(batch, tokens, heads, dim).transpose(1, 2)
