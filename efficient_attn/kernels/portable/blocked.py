"""Exact attention in ATen, one block of query rows at a time: any device, any option.

A block of rows holds its scores against all keys it may see, so memory grows linearly with the
number of tokens and the softmax needs no running state. Key and value heads are read where they
are: a head that serves a group is multiplied with the whole group, never copied to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_attn.kernels.conventions import accumulator, tokens_major

# Scores held at once: 4 MB in fp32, which stays in the caches of a server CPU.
_SCORES_PER_BLOCK = 1 << 20


@dataclass(frozen=True)
class _Options:
    """What every block needs to know besides its own slices."""

    bias: Tensor | None  # (B | 1, Hq | 1, Nq | 1, Nk | 1)
    key_lengths: Tensor | None  # (B,)
    left: int | None
    right: int | None
    scale: float
    softcap: float


@dataclass(frozen=True)
class _Heads:
    """``R`` query heads beside each of the ``G`` key and value heads that serve them.

    query: ``(B, G, R, Nq, D)``; key: ``(B, G, Nk, D)``; value: ``(B, G, Nk, Dv)``; ``heads`` are
    the query heads, in the order of ``(G, R)``, as a slice.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    heads: slice


def forward(
    query, key, value, q_to_k, q_to_v, bias, key_lengths, left, right, scale, softcap
) -> tuple[Tensor, Tensor]:
    """The ``attention`` op."""
    dtype = accumulator(query.dtype)
    batch, num_heads, nq, _ = query.shape
    out = query.new_empty(batch, nq, num_heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, num_heads, nq, dtype=dtype)
    options = _Options(_four_dims(bias), key_lengths, left, right, scale, softcap)
    for part in _parts(query, key, value, q_to_k, q_to_v, key_lengths):
        for rows, columns in _blocks(part, options):
            score, _ = _scores(part, rows, columns, options)
            block_lse = torch.logsumexp(score, dim=-1)
            weight = score.sub_(_finite(block_lse).unsqueeze(-1)).exp_()
            block = torch.matmul(weight.flatten(2, 3), part.value[:, :, columns])
            lse[:, part.heads, rows] = block_lse.flatten(1, 2)
            out[:, part.heads, rows] = (
                block.unflatten(2, score.shape[2:4]).flatten(1, 2).to(out.dtype)
            )
    return out, lse


def backward(
    grad_out, grad_lse, query, key, value, out, lse, q_to_k, q_to_v, bias, key_lengths,
    left, right, scale, softcap, needs_bias_grad,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The ``attention_backward`` op; sums over groups are taken in fp32 in a fixed order."""
    dtype = accumulator(query.dtype)
    options = _Options(_four_dims(bias), key_lengths, left, right, scale, softcap)
    grad_out = grad_out.to(dtype)
    delta = (grad_out * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    lse = _finite(lse)
    grad_query = torch.zeros_like(query, dtype=dtype, memory_format=torch.contiguous_format)
    grad_key, grad_value = (
        torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        for x in (key, value)
    )
    grad_bias = torch.zeros_like(options.bias, dtype=dtype) if needs_bias_grad else None

    for part in _parts(query, key, value, q_to_k, q_to_v, key_lengths):
        part_grad_key, part_grad_value = torch.zeros_like(part.key), torch.zeros_like(part.value)
        for rows, columns in _blocks(part, options):
            score, slope = _scores(part, rows, columns, options)
            shape = score.shape
            grouped = (shape[1], -1)

            def rows_of(x, heads=part.heads, rows=rows, grouped=grouped):
                """This block's rows of ``(B, Hq, Nq, ...)`` as ``(B, G, R * rows, ...)``."""
                return x[:, heads, rows].unflatten(1, grouped).flatten(2, 3)

            weight = score.flatten(2, 3).sub_(rows_of(lse).unsqueeze(-1)).exp_()
            block_grad = rows_of(grad_out)
            part_grad_value[:, :, columns] += weight.mT @ block_grad
            grad_score = block_grad @ part.value[:, :, columns].mT
            grad_score = weight.mul_(grad_score.sub_(rows_of(delta).unsqueeze(-1)))
            if grad_bias is not None:
                _add_bias_grad(
                    grad_bias, grad_score.view(shape).flatten(1, 2), part.heads, rows, columns
                )
            if slope is not None:
                grad_score = grad_score * slope.flatten(2, 3)
            grad_score = grad_score * scale
            block_query = part.query[:, :, :, rows].flatten(2, 3).to(dtype)
            part_grad_key[:, :, columns] += grad_score.mT @ block_query
            grad = grad_score @ part.key[:, :, columns]
            grad_query[:, part.heads, rows] = grad.unflatten(2, shape[2:4]).flatten(1, 2)
        _add_heads(grad_key, part_grad_key, q_to_k, part.heads, query.shape[1])
        _add_heads(grad_value, part_grad_value, q_to_v, part.heads, query.shape[1])

    grads = (
        tokens_major(grad.to(x.dtype))
        for grad, x in ((grad_query, query), (grad_key, key), (grad_value, value))
    )
    grad_bias = (
        query.new_empty(0) if grad_bias is None else (grad_bias.reshape(bias.shape).to(bias.dtype))
    )
    return *grads, grad_bias


def _parts(query, key, value, q_to_k, q_to_v, key_lengths) -> Iterator[_Heads]:
    """All heads at once where groups are even and shared, otherwise one query head at a time."""
    num_heads, num_k_heads = query.shape[1], key.shape[1]
    dtype = accumulator(query.dtype)

    def loaded(x: Tensor) -> Tensor:
        """Upcast, with the tokens behind ``key_lengths`` replaced: they may hold NaN."""
        x = x.to(dtype)
        if key_lengths is None:
            return x
        positions = torch.arange(x.shape[2], device=x.device)
        behind = positions >= key_lengths.to(x.device).unsqueeze(-1)
        return x.masked_fill(behind[:, None, :, None], 0.0)

    if q_to_k is None and q_to_v is None and num_k_heads == value.shape[1]:
        grouped = query.unflatten(1, (num_k_heads, num_heads // num_k_heads))
        yield _Heads(grouped, loaded(key), loaded(value), slice(0, num_heads))
        return
    for head in range(num_heads):
        yield _Heads(
            query[:, head : head + 1].unsqueeze(2),
            loaded(_take_head(key, q_to_k, head, num_heads)),
            loaded(_take_head(value, q_to_v, head, num_heads)),
            slice(head, head + 1),
        )


def _blocks(part: _Heads, options: _Options) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows, each with the range of keys that its window can reach."""
    batch, groups, members, nq, _ = part.query.shape
    nk = part.key.shape[2]
    size = max(1, _SCORES_PER_BLOCK // max(1, batch * groups * members * nk))
    for start in range(0, nq, size):
        stop = min(start + size, nq)
        low, high = 0, nk
        if options.right is not None:
            high = min(nk, stop + nk - nq + options.right)
        # Shorter keys move the diagonal to the left, so only full lengths bound the range there.
        if options.left is not None and options.key_lengths is None:
            low = max(0, start + nk - nq - options.left)
        yield slice(start, stop), slice(low, max(low, high))


def _scores(
    part: _Heads, rows: slice, columns: slice, options: _Options
) -> tuple[Tensor, Tensor | None]:
    """Masked scores ``(B, G, R, rows, columns)`` and, under a softcap, its derivative."""
    query = part.query[:, :, :, rows].to(part.key.dtype)
    keys = part.key[:, :, columns]
    score = torch.matmul(query.flatten(2, 3), keys.mT).mul_(options.scale)
    score = score.unflatten(2, query.shape[2:4])
    slope = None
    if options.softcap > 0:
        capped = torch.tanh(score / options.softcap)
        slope = 1 - capped.square()
        score = capped * options.softcap
    if options.bias is not None:
        bias = _slice_bias(options.bias, part.heads, rows, columns)
        score += bias.unflatten(1, (-1, 1) if bias.shape[1] == 1 else score.shape[1:3])
    mask = _mask(part, rows, columns, options)
    return (score if mask is None else score.masked_fill_(~mask, -torch.inf)), slope


def _mask(part: _Heads, rows: slice, columns: slice, options: _Options) -> Tensor | None:
    """True where a row sees a column: ``(1 | B, 1, 1, rows, columns)``, or None for everywhere."""
    left, right, lengths = options.left, options.right, options.key_lengths
    if left is None and right is None and lengths is None:
        return None
    nq, nk, device = part.query.shape[3], part.key.shape[2], part.key.device
    length = torch.full((1,), nk, device=device) if lengths is None else lengths.to(device)
    length = length[:, None, None]
    column = torch.arange(columns.start, columns.stop, device=device)
    distance = column - (torch.arange(rows.start, rows.stop, device=device)[:, None] + length - nq)
    mask = column < length
    if left is not None:
        mask = mask & (distance >= -left)
    if right is not None:
        mask = mask & (distance <= right)
    return mask[:, None, None]


def _slice_bias(bias: Tensor, heads: slice, rows: slice, columns: slice) -> Tensor:
    """The entries of a ``(B, H, N, M)`` bias for one block; a dimension of one serves all."""
    wanted = (slice(None), heads, rows, columns)
    return bias[
        tuple(slice(None) if n == 1 else s for n, s in zip(bias.shape, wanted, strict=True))
    ]


def _add_bias_grad(
    grad_bias: Tensor, grad: Tensor, heads: slice, rows: slice, columns: slice
) -> None:
    target = _slice_bias(grad_bias, heads, rows, columns)
    target += grad.sum_to_size(target.shape)


def _take_head(x: Tensor, index: Tensor | None, head: int, num_heads: int) -> Tensor:
    """The head of ``x`` that query head ``head`` reads, ``(B, 1, N, D)``; never a host read."""
    if index is None:
        head = head * x.shape[1] // num_heads
        return x[:, head : head + 1]
    if index.dim() == 1:
        return x.index_select(1, index[head : head + 1])
    return x.take_along_dim(index[:, head].long()[:, None, None, None], dim=1)


def _add_heads(
    total: Tensor, grad: Tensor, index: Tensor | None, heads: slice, num_heads: int
) -> None:
    """Add a part's gradient to the heads it was read from."""
    if grad.shape[1] == total.shape[1] and heads == slice(0, num_heads):
        total += grad
    elif index is None:
        head = heads.start * total.shape[1] // num_heads
        total[:, head : head + 1] += grad
    elif index.dim() == 1:
        total.index_add_(1, index[heads], grad)
    else:
        total.scatter_add_(1, index[:, heads].long()[:, :, None, None].expand_as(grad), grad)


def _four_dims(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.reshape((1,) * (4 - bias.dim()) + bias.shape)


def _finite(lse: Tensor) -> Tensor:
    """Zero in place of -inf, so that a row that sees nothing gives exp(-inf - 0) = 0."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
