"""HyperAttention in ATen: every tile of a plan is a small attention call, many tiles are a batch.

The parts of a query's keys are computed one after the other and merged into its result by
log-sum-exp. Leaves read their near keys where they lie; what lies apart is gathered, a few tiles at
a time, so that memory grows with the tokens only. Given the merged output and log-sum-exp, the
ordinary backward of each part is its exact gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from efficient_attn.kernels.conventions import accumulator, tokens_major
from efficient_attn.kernels.portable import attention
from efficient_attn.kernels.portable.leaves import leaf_runs
from efficient_attn.kernels.portable.tiles import far_tiles
from efficient_attn.planning import HyperPlan


def forward(query: Tensor, key: Tensor, value: Tensor, *plan_and_scale) -> tuple[Tensor, Tensor]:
    """The ``hyper_attention`` op."""
    *fields, scale = plan_and_scale
    plan = HyperPlan(*fields)
    batch, num_heads, nq, _ = query.shape
    dtype = accumulator(query.dtype)
    total = batch * num_heads * nq
    # One row more than there are, for the empty places of tiles. The output lies token by token.
    out = torch.zeros(total + 1, value.shape[-1], dtype=dtype, device=query.device)
    lse = torch.full((total + 1,), -torch.inf, dtype=dtype, device=query.device)
    dense_out = out[:-1].view(batch, nq, num_heads, value.shape[-1]).transpose(1, 2)
    dense_lse = lse[:-1].view(batch, num_heads, nq)
    for sample in range(batch):
        q, k, v = (x[sample] for x in (query, key, value))
        for run in leaf_runs(plan, nq, key.shape[2], num_heads * query.shape[-1]):
            part = attend(run.queries(q), run.keys(k), run.keys(v), None, plan.causal, scale)
            run.queries(dense_out[sample]).copy_(part[0])
            run.queries(dense_lse[sample].unsqueeze(-1)).copy_(part[1].unsqueeze(-1))

    q, k, v, result = (Rows.of(x) for x in (query, key, value, dense_out))
    # Without leaves and with one level, a row is in one tile, and there is nothing to merge with.
    put = _put if plan.leaf_size == 0 and plan.key_order.shape[2] == 1 else _merge
    for rows, keys, bias in far_tiles(plan, query, key):
        real = rows.clamp(max=total - 1)
        tile_q, tile_k, tile_v = gather(q, real), gather(k, keys), gather(v, keys)
        part_out, part_lse = attend(tile_q, tile_k, tile_v, bias, False, scale)
        rows = rows.flatten()
        put(out, lse, result.places(rows), rows, part_out.flatten(0, 2), part_lse.flatten())
    return dense_out.to(query.dtype), dense_lse.clone()


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query, key, value, out, lse, *plan_and_scale
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``hyper_attention_backward`` op."""
    *fields, scale = plan_and_scale
    plan = HyperPlan(*fields)
    batch, num_heads, nq, _ = query.shape
    total = batch * num_heads * nq
    dtype = accumulator(query.dtype)
    grad_q = torch.zeros(total + 1, query.shape[-1], dtype=dtype, device=query.device)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    dense_grad_q = grad_q[:-1].view(query.shape)
    for sample in range(batch):
        k, v = key[sample], value[sample]
        rows = (grad_out, None if grad_lse is None else grad_lse.unsqueeze(-1), query, out)
        rows = (*rows, lse.unsqueeze(-1))
        for run in leaf_runs(plan, nq, key.shape[2], num_heads * query.shape[-1]):
            of_queries = (None if x is None else run.queries(x[sample]) for x in rows)
            grads = _attend_backward(
                *of_queries, run.keys(k), run.keys(v), None, plan.causal, scale
            )
            run.queries(dense_grad_q[sample]).add_(grads[0])
            run.add_keys(grad_k[sample], grads[1])
            run.add_keys(grad_v[sample], grads[2])

    rows = (grad_out, None if grad_lse is None else grad_lse.unsqueeze(-1), query, out)
    rows = (*rows, lse.unsqueeze(-1))
    of_rows = [None if x is None else Rows.of(x) for x in rows]
    k, v = (Rows.of(x) for x in (key, value))
    for row, column, bias in far_tiles(plan, query, key):
        real = row.clamp(max=total - 1)
        of_queries = [None if x is None else gather(x, real) for x in of_rows]
        if (empty := row == total).any():
            # A row of zeros gives no gradient, and no overflow against keys that nobody chose.
            for x in of_queries:
                if x is not None:
                    x.masked_fill_(empty[:, None, :, None], 0.0)
        grads = _attend_backward(
            *of_queries, gather(k, column), gather(v, column), bias, False, scale
        )
        _add_rows(grad_q, row, grads[0])
        _add_rows(grad_k.view(-1, key.shape[-1]), column, grads[1])
        _add_rows(grad_v.view(-1, value.shape[-1]), column, grads[2])
    grads = (dense_grad_q, grad_k, grad_v)
    return tuple(tokens_major(g.to(query.dtype)) for g in grads)


def attend(query, key, value, bias, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Exact attention of many tiles, ``(tiles, heads, tokens, D)``."""
    right = 0 if causal else None
    return attention.forward(query, key, value, None, None, bias, None, None, right, scale, 0.0)


def _attend_backward(grad_out, grad_lse, query, out, lse, key, value, bias, causal, scale):
    right = 0 if causal else None
    if grad_lse is not None:
        grad_lse = grad_lse.squeeze(-1)
    *grads, _ = attention.backward(
        grad_out, grad_lse, query, key, value, out, lse.squeeze(-1),
        None, None, bias, None, None, right, scale, 0.0, False,
    )  # fmt: skip
    return grads


class Rows(NamedTuple):
    """Tokens ``(B, H, N, D)`` as rows of a matrix, in the order in which they lie in memory."""

    data: Tensor
    heads: int
    tokens: int
    by_token: bool

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """Without a copy, if tokens lie one after the other, or heads do."""
        by_token = x.shape[1] > 1 and x.transpose(1, 2).is_contiguous()
        lying = x.transpose(1, 2) if by_token else x
        return cls(lying.reshape(-1, x.shape[-1]), x.shape[1], x.shape[2], by_token)

    def places(self, number: Tensor) -> Tensor:
        """Where rows are that are numbered head by head; the number of all rows stays itself."""
        if not self.by_token:
            return number
        plane, token = number // self.tokens, number % self.tokens
        sample, head = plane // self.heads, plane % self.heads
        return (sample * self.tokens + token) * self.heads + head


def gather(x: Rows, index: Tensor) -> Tensor:
    """Rows as ``(tiles, 1, tokens, D)``, in the accumulator's precision."""
    rows = x.data.index_select(0, x.places(index.flatten())).to(accumulator(x.data.dtype))
    return rows.view(index.shape[0], 1, index.shape[1], x.data.shape[-1])


def _put(out: Tensor, lse: Tensor, places: Tensor, rows: Tensor, part_out, part_lse) -> None:
    """Write the rows a part is about; none occurs twice, but for the one for no row."""
    out.index_copy_(0, places, part_out)
    lse.index_copy_(0, rows, part_lse)


def _merge(out: Tensor, lse: Tensor, places: Tensor, rows: Tensor, part_out, part_lse) -> None:
    """The same where there is something already, by log-sum-exp."""
    before = lse.index_select(0, rows)
    after = torch.logaddexp(before, part_lse)
    share = torch.exp(part_lse - after.masked_fill(after == -torch.inf, 0.0)).unsqueeze(-1)
    out.index_copy_(0, places, torch.lerp(out.index_select(0, places), part_out, share))
    lse.index_copy_(0, rows, after)


def _add_rows(total: Tensor, index: Tensor, grad: Tensor) -> None:
    """``total[index] += grad``; a row that occurs more than once adds up in a fixed order."""
    index = index.reshape(-1, 1).expand(-1, total.shape[-1])
    total.scatter_add_(0, index, grad.reshape(index.shape).to(total.dtype))
