"""The far part of a plan: tiles of queries that share the keys they meet, to be gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_attn.planning import HyperPlan
from efficient_attn.planning.layout import leaf_range, near_keys

# Elements gathered at once: 16 MB in fp32, which stays in the caches of a server CPU.
_ELEMENTS = 1 << 22


class Tiles(NamedTuple):
    """``X`` tiles; a query is in at most one of those that are yielded together.

    Attributes:
        rows: Queries among all of ``(B, Hq, nq)``, ``(X, T)``; their number stands for none.
        keys: Keys among all of ``(B, Hk, nk)``, ``(X, C)``.
        bias: Log weights, ``-inf`` for what does not count, ``(X, 1, T | 1, C)``.
    """

    rows: Tensor
    keys: Tensor
    bias: Tensor


class _Geometry(NamedTuple):
    plan: HyperPlan
    batch: int
    heads: int
    group: int
    nq: int
    nk: int

    @property
    def rows(self) -> int:
        """Queries that read one key head."""
        return self.group * self.nq

    def all_rows(self, head: Tensor, row: Tensor) -> Tensor:
        """Number rows through all heads; ``-1`` becomes the number of all."""
        total = self.batch * self.heads * self.rows
        return torch.where(row < 0, total, head.view(-1, 1) * self.rows + row)

    def is_near(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Whether keys ``(X, 1, C)`` are in the window of rows ``(X, T, 1)``."""
        plan = self.plan
        position = rows % max(self.nq, 1) + (self.nk - self.nq)
        first, end = near_keys(position, self.nk, plan.leaf_size, plan.window, plan.causal)
        return (keys >= first) & (keys < end)


def far_tiles(plan: HyperPlan, query: Tensor, key: Tensor) -> Iterator[Tiles]:
    """Everything that is not near: hashed blocks, level by level, and samples."""
    batch, heads, nk, dim = key.shape
    geometry = _Geometry(plan, batch, heads, query.shape[1] // heads, query.shape[2], nk)
    if plan.samples_by_leaf and plan.sinks + plan.sample_keys.shape[-1]:
        yield from _sample_tiles(geometry, dim)
    if plan.block_rows.shape[2]:
        yield from _block_tiles(geometry, dim)


def sampled_tiles(plan: HyperPlan, query: Tensor, key: Tensor) -> Iterator[Tiles]:
    """The sampled columns alone; the bias of those that are exact for a row is ``-inf``."""
    batch, heads, nk, dim = key.shape
    geometry = _Geometry(plan, batch, heads, query.shape[1] // heads, query.shape[2], nk)
    draws = plan.sample_keys.shape[-1]
    for tile in (_sample_tiles if plan.samples_by_leaf else _block_tiles)(geometry, dim):
        yield Tiles(tile.rows, tile.keys[:, -draws:], tile.bias[..., -draws:])


def _block_tiles(geometry: _Geometry, dim: int) -> Iterator[Tiles]:
    plan, nk = geometry.plan, geometry.nk
    first = plan.block_first.flatten(0, 1)
    rows = plan.block_rows.flatten(0, 1)
    levels = plan.key_order.shape[2]
    columns = plan.block_size + (0 if plan.samples_by_leaf else plan.sample_keys.shape[-1])
    for level in range(levels):
        # Tiles without rows, which exist because their number is fixed, are left out.
        here = (rows[:, :, 0] >= 0) & (first // nk == level)
        head, tile = here.nonzero().unbind(-1)
        for part in _chunks(len(head), rows.shape[-1], columns, dim):
            h, t = head[part], tile[part]
            row = rows[h, t]
            start = (first[h, t] - level * nk).unsqueeze(-1)
            reach = start + torch.arange(plan.block_size, device=start.device)
            plane = (h * levels + level).unsqueeze(-1)
            keys = _take(plan.key_order, plane, reach.clamp(max=nk - 1))
            # All rows of a tile have the same band, unless it ends where their past does.
            one_or_all = row if plan.samples_by_leaf else row[:, :1]
            end = _take(plan.band_end, plane, one_or_all.clamp(min=0))
            counts = reach.unsqueeze(1) < end.unsqueeze(-1)
            if plan.samples_by_leaf and not plan.causal:
                counts = counts & ~geometry.is_near(row.unsqueeze(-1), keys.unsqueeze(1))
            bias = _log(counts)
            if not plan.samples_by_leaf:
                sample = plan.block_sample[t].long()
                drawn = plan.sample_keys[h % geometry.heads, sample]
                drawn_rank = _take(plan.key_rank, plane, drawn)
                outside = (drawn_rank < start) | (drawn_rank >= end)
                weight = torch.where(outside, plan.sample_log_weight[sample], -torch.inf)
                keys = torch.cat([keys, drawn], dim=-1)
                bias = torch.cat([bias, weight.unsqueeze(1)], dim=-1)
            keys = (h * nk).unsqueeze(-1) + keys
            yield Tiles(geometry.all_rows(h, row), keys, bias.unsqueeze(1))


def _sample_tiles(geometry: _Geometry, dim: int) -> Iterator[Tiles]:
    plan, nq, nk = geometry.plan, geometry.nq, geometry.nk
    device, size = plan.key_order.device, plan.leaf_size
    first_leaf, _ = leaf_range(nq, nk, size, plan.causal)
    begin = max(nk - nq, 0) // size if plan.causal else (nk - nq) // size
    end = (nk - 1) // size + 1
    leaves = torch.arange(begin, end, device=device)
    in_leaf = (leaves * size).unsqueeze(-1) + torch.arange(size, device=device)
    query = in_leaf - (nk - nq)
    exists = (query >= 0) & (query < nq) & ((in_leaf >= 0) | (not plan.causal))
    head_of_group = torch.arange(geometry.group, device=device).view(1, -1, 1)
    rows = torch.where(exists.unsqueeze(1), head_of_group * nq + query.unsqueeze(1), -1).flatten(1)

    sink = torch.arange(plan.sinks, device=device)
    near_first, near_end = near_keys(leaves * size, nk, size, plan.window, plan.causal)
    far_sink = (sink < near_first.unsqueeze(-1)) | (sink >= near_end.unsqueeze(-1))
    if plan.causal:
        far_sink = sink < near_first.unsqueeze(-1)
    sink_bias = _log(far_sink)
    sample_bias = plan.sample_log_weight[begin - first_leaf : end - first_leaf]
    samples = plan.sample_keys[:, begin - first_leaf : end - first_leaf]
    bands = plan.band_start.shape[2] > 0
    columns = samples.shape[-1] + plan.sinks

    for head in range(geometry.batch * geometry.heads):
        for part in _chunks(len(leaves), rows.shape[1], columns, dim):
            row, drawn = rows[part], samples[head % geometry.heads, part]
            bias = sample_bias[part].unsqueeze(1)
            if bands:
                plane = torch.tensor(head, device=device)
                rank = _take(plan.key_rank, plane, drawn).unsqueeze(1)
                start, stop = (
                    _take(x, plane, row.clamp(min=0)).unsqueeze(-1)
                    for x in (plan.band_start, plan.band_end)
                )
                bias = torch.where((rank >= start) & (rank < stop), -torch.inf, bias)
            sinks = sink.expand(len(row), -1)
            bias = torch.cat(
                [sink_bias[part].unsqueeze(1).expand(-1, bias.shape[1], -1), bias], dim=-1
            )
            keys = torch.cat([sinks, drawn], dim=-1) + head * nk
            number = torch.full((len(row),), head, device=device)
            yield Tiles(geometry.all_rows(number, row), keys, bias.unsqueeze(1))


def _chunks(count: int, rows: int, columns: int, dim: int) -> Iterator[slice]:
    """Slices of the tiles, such that neither their tokens nor their scores are too many."""
    size = max(1, _ELEMENTS // max(dim * (rows + 2 * columns), rows * columns))
    for start in range(0, count, size):
        yield slice(start, start + size)


def _take(x: Tensor, plane: Tensor, index: Tensor) -> Tensor:
    """``x[plane, index]``, where planes are the last dimension of ``x``."""
    return x.view(-1).index_select(0, (plane * x.shape[-1] + index).flatten()).view(index.shape)


def _log(counts: Tensor) -> Tensor:
    return torch.zeros(counts.shape, device=counts.device).masked_fill_(~counts, -torch.inf)
