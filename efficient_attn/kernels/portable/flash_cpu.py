"""Exact attention on CPU as a few calls of torch's own flash op, which returns the log-sum-exp.

The op knows even groups, a square causal mask and an additive mask. Everything else is cut into
problems of that kind: one per sample where samples differ, one per chunk of heads where groups do,
and one per block of rows where a window slides. Gradients of a group are summed in fp32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from efficient_attn.kernels.conventions import accumulator, tokens_major
from efficient_attn.kernels.portable.cutting import (
    Heads,
    Piece,
    Problem,
    pieces,
    problems,
)
from efficient_attn.masking import visible

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# From this many queries and keys on, a shared head is copied to one place, its tokens side by side:
# to read it over and over where it lies among others costs more.
_LONG = 4096


def refusals(softcap: float, grad_lse: Tensor | None, needs_bias_grad: bool) -> list[str]:
    """Why torch's op cannot compute this call; empty if it can."""
    reasons = []
    if softcap > 0:
        reasons.append("torch's CPU flash op has no softcap")
    if grad_lse is not None:
        reasons.append("its backward takes no gradient of the log-sum-exp")
    if needs_bias_grad:
        reasons.append("its backward gives no gradient of the mask")
    return reasons


def forward(
    query, key, value, q_to_k, q_to_v, bias, key_lengths, left, right, scale
) -> tuple[Tensor, Tensor]:
    """The ``attention`` op without softcap."""
    batch, num_heads, nq, _ = query.shape
    shape = (batch, num_heads, nq, value.shape[-1])
    # Before a head is copied to the query heads of a chunk, since it is smaller then.
    key, value = _equal_widths(key, value)
    read = (query, key, value, q_to_k, q_to_v, key_lengths)
    out = lse = None
    for problem in problems(*read, _groups_natively()):
        q, k, v, mask = _select(problem, query, key, value, bias)
        for together in pieces(nq, problem.length, left, right):
            results = [
                _call(piece, q, k, v, mask, shape[-1], left, right, scale) for piece in together
            ]
            block_out, block_lse = functools.reduce(_merge, results)
            if block_out.shape == shape:
                return tokens_major(block_out.to(query.dtype)), block_lse.contiguous()
            if out is None:
                room = _room if _every_row_is_reached(query, key, key_lengths, right) else blind
                out, lse = room(query, shape[-1])
            rows = together[0].rows
            out[problem.samples, problem.q_heads, rows] = block_out.to(out.dtype)
            lse[problem.samples, problem.q_heads, rows] = block_lse
            del results, block_out, block_lse
        # Held on to, a chunk would lie beside the next one.
        del q, k, v, mask
    return (out, lse) if out is not None else blind(query, shape[-1])


def backward(
    grad_out, query, key, value, out, lse, q_to_k, q_to_v, bias, key_lengths, left, right, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``attention_backward`` op without softcap, gradient of the lse or of the bias.

    Given the final output and log-sum-exp, the backward of each piece is exact on its own.
    """
    dtypes = [x.dtype for x in (query, key, value)]
    shapes = [x.shape for x in (query, key, value)]
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    if not _multiplies_natively(query.dtype):
        query, key, value, out, grad_out = (x.float() for x in (query, key, value, out, grad_out))
    # Before a head is copied to the query heads of a chunk, since it is smaller then.
    key, value = _equal_widths(key, value)
    read = (query, key, value, q_to_k, q_to_v, key_lengths)
    widths = [shape[-1] for shape in shapes]
    totals: list[Tensor] | None = None
    for problem in problems(*read, _groups_natively(), _occupies_threads(key)):
        q, k, v, mask = _select(problem, query, key, value, bias)
        samples = problem.samples
        for together in pieces(query.shape[2], problem.length, left, right):
            rows = together[0].rows
            result = (x[samples, problem.q_heads, rows] for x in (grad_out, out, lse))
            block_grad, block_out, block_lse = result
            for number, piece in enumerate(together):
                columns = piece.columns
                grads = _call_backward(
                    piece, block_grad, q, k, v, mask, block_out, block_lse, left, right, scale
                )
                grads = [grad[..., :width] for grad, width in zip(grads, widths, strict=True)]
                if [grad.shape for grad in grads] == shapes:
                    return _finished(grads, dtypes)
                if totals is None:
                    totals = [_zeros(shape, query) for shape in shapes]
                grad_query = totals[0][samples, problem.q_heads, rows]
                grad_query.add_(grads[0]) if number else grad_query.copy_(grads[0])
                _add_heads(totals[1][samples, :, columns], problem.k_heads, grads[1])
                _add_heads(totals[2][samples, :, columns], problem.v_heads, grads[2])
                del grads
        del q, k, v, mask
    if totals is None:
        totals = [_zeros(shape, query) for shape in shapes]
    return _finished(totals, dtypes)


def _call(piece: Piece, q, k, v, mask, width, left, right, scale) -> tuple[Tensor, Tensor]:
    q, k, v, mask = _cut(piece, q, k, v, mask, left, right)
    q, k, v = _equal_widths(q, k, v)
    out, lse = _flash(q, k, v, 0.0, piece.causal, attn_mask=mask, scale=scale)
    if mask is not None:
        # The op reports lse = 0 for a row that sees nothing.
        lse = lse.masked_fill(_blind_rows(mask, piece.causal), -torch.inf)
    return out[..., :width], lse


def _call_backward(piece: Piece, grad_out, q, k, v, mask, out, lse, left, right, scale):
    q, k, v, mask = _cut(piece, q, k, v, mask, left, right)
    grad_out, q, k, v, out = _equal_widths(grad_out, q, k, v, out)
    return _flash_backward(
        grad_out, q, k, v, out, lse, 0.0, piece.causal, attn_mask=mask, scale=scale
    )


def _select(problem: Problem, query, key, value, bias):
    samples, q_heads, k_heads, v_heads, length = problem
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
        bias = bias if bias.shape[0] == 1 else bias[samples]
        bias = bias if bias.shape[1] == 1 else bias[:, q_heads]
        bias = bias.expand(*bias.shape[:-1], key.shape[2])[..., :length]
        # The op takes masks in its own dtype and in fp32, but beside fp64 it misreads fp32.
        if query.dtype == torch.float64:
            bias = bias.double()
        elif bias.dtype not in (query.dtype, torch.float32):
            bias = bias.float()
    return (
        query[samples, q_heads],
        *(
            _read_heads(x[samples, :, :length], heads, query)
            for x, heads in ((key, k_heads), (value, v_heads))
        ),
        bias,
    )


def _read_heads(x: Tensor, heads: Heads, query: Tensor) -> Tensor:
    """The named heads of ``x``; a view where they are short, and one head or neighbours."""
    is_shared = x.shape[1] < query.shape[1]
    long = is_shared and min(query.shape[2], x.shape[2]) >= _LONG
    if isinstance(heads, slice):
        return x[:, heads].contiguous() if long else x[:, heads]
    if isinstance(heads, Tensor):
        return x[torch.arange(len(heads)).unsqueeze(1), heads]
    first, count = heads[0], len(heads)
    if heads == [first] * count:
        x = x[:, first : first + 1]
        return (x.contiguous() if long else x).expand(-1, count, -1, -1)
    if heads == list(range(first, first + count)):
        x = x[:, first : first + count]
        return x.contiguous() if long else x
    return x.index_select(1, torch.tensor(heads))


def _add_heads(total: Tensor, heads: Heads, grad: Tensor) -> None:
    """Add to each head what the query heads that read it gave, in their order."""
    if isinstance(heads, slice):
        total[:, heads] += grad
    elif isinstance(heads, Tensor):
        for sample, index in enumerate(heads):
            total[sample].index_add_(0, index, grad[sample].to(total.dtype))
    else:
        total.index_add_(1, torch.tensor(heads), grad.to(total.dtype))


def _cut(piece: Piece, q, k, v, mask, left, right):
    """The piece's part of one problem's tensors, with the window written into the mask."""
    rows, columns = piece.rows, piece.columns
    if mask is not None:
        mask = mask[..., columns] if mask.shape[2] == 1 else mask[..., rows, columns]
    if mask is not None and mask.stride(-1) not in (0, 1):
        mask = mask.contiguous()
    if piece.masked:
        nq, nk = rows.stop - rows.start, columns.stop - columns.start
        # visible() puts the diagonal in the piece's own corner; shift it to the whole problem's.
        shift = (rows.stop + k.shape[2] - q.shape[2]) - columns.stop
        window = visible(
            nq,
            nk,
            None if left is None else left - shift,
            None if right is None else right + shift,
        )
        mask = torch.zeros((), dtype=q.dtype) if mask is None else mask
        mask = mask.masked_fill(~window, -torch.inf)
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    return q[:, :, rows], k[:, :, columns], v[:, :, columns], mask


def _blind_rows(mask: Tensor, causal: bool) -> Tensor:
    """Rows in which every visible entry is -inf, ``(B | 1, H | 1, rows | 1)``."""
    blocked = mask == -torch.inf
    if not causal:
        return blocked.all(-1)
    if mask.shape[2] == 1:
        return blocked.squeeze(2).long().cumprod(-1).bool()
    return (blocked | blocked.new_ones(blocked.shape[2:]).triu(1)).all(-1)


def _equal_widths(*tensors: Tensor) -> list[Tensor]:
    """Pad to one head width, which the op insists on, with adjacent elements, which it assumes."""
    width = max(x.shape[-1] for x in tensors)
    padded = (pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two parts; both see something, or the row is blind in both."""
    lse = torch.logaddexp(a[1], b[1])
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    out = sum(torch.exp(part - finite).unsqueeze(-1) * out.to(lse.dtype) for out, part in (a, b))
    return out, lse


@functools.cache
def _groups_natively() -> bool:
    """Whether this torch's op serves several query heads from one key head, as 2.13's does."""
    query = torch.tensor([[[[0.0]], [[0.0]]]])
    one = torch.ones(1, 1, 1, 1)
    try:
        out, _ = _flash(query, one, one)
    except RuntimeError:
        return False
    return bool((out == 1).all())


def _every_row_is_reached(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, right: int | None
) -> bool:
    """Whether the pieces together leave no row of the result out."""
    return key_lengths is None and (right is None or key.shape[2] + right >= query.shape[2])


def _room(query: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Memory for the result, uninitialized."""
    batch, num_heads, nq, _ = query.shape
    out = query.new_empty(batch, nq, num_heads, width).transpose(1, 2)
    dtype = accumulator(query.dtype)
    return out, query.new_empty(batch, num_heads, nq, dtype=dtype)


def blind(query: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The result where no query sees any key; values are ``width`` wide."""
    out, lse = _room(query, width)
    return out.zero_(), lse.fill_(-torch.inf)


@functools.cache
def _multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype``.

    Where it does not, the op's backward converts tile by tile and takes five times as long as a
    backward in fp32. The forward is not slower, since it converts to fp32 only once.
    """
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def _occupies_threads(key: Tensor) -> bool:
    """Whether there are enough key heads for the op's backward, which gives each one a thread."""
    tasks, threads = key.shape[0] * key.shape[1], torch.get_num_threads()
    return tasks % threads == 0 or tasks >= 4 * threads


def _zeros(shape: torch.Size, like: Tensor) -> Tensor:
    dtype = accumulator(like.dtype)
    batch, heads, tokens, dim = shape
    return like.new_zeros(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)


def _finished(grads: list[Tensor], dtypes: list[torch.dtype]) -> tuple[Tensor, ...]:
    return tuple(tokens_major(g.to(dtype)) for g, dtype in zip(grads, dtypes, strict=True))
