"""What an estimate must give: the sampled rows of a plan, written out key by key in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

import efficient_attn as ea
from bench.workloads import HYPER_CONFIGS, Inputs, Workload
from efficient_attn.planning.layout import leaf_range, near_keys


def plan_of(workload: Workload, inputs: Inputs) -> ea.HyperPlan:
    """The plan that the timed call makes for itself."""
    config = HYPER_CONFIGS[workload.hyper]
    query, key, _ = (x.detach() for x in inputs)
    return ea.hyper_plan(query, key, causal=workload.causal, config=config)


def log_multiplicity(plan: ea.HyperPlan, nq: int, head: int, row: Tensor) -> Tensor:
    """How often rows of one head count each key, as a logarithm: fp64 ``(rows, nk)``.

    Sample 0 of the batch. The definition is that of :class:`efficient_attn.HyperPlan`, read row by
    row; nothing of the package's own kernels is used.
    """
    nk = plan.key_order.shape[-1]
    group = plan.band_start.shape[-1] // nq
    kv, row = head // group, head % group * nq + row
    position = row % nq + nk - nq
    key = torch.arange(nk, device=row.device)
    first, end = (
        x.unsqueeze(-1) for x in near_keys(position, nk, plan.leaf_size, plan.window, plan.causal)
    )
    near = (key < plan.sinks) | (key >= first) & (key < end)
    if plan.causal:
        near &= key <= position.unsqueeze(-1)
    total = near.double()
    samples = plan.sample_keys[kv].long()
    if plan.samples_by_leaf:
        leaf = position // plan.leaf_size - leaf_range(nq, nk, plan.leaf_size, plan.causal)[0]
        total += ~near * _counted(samples[leaf], plan.sample_log_weight[leaf], nk)
    for level in range(plan.key_order.shape[2]):
        rank = plan.key_rank[0, kv, level]
        start, stop = (x[0, kv, level, row, None] for x in (plan.band_start, plan.band_end))
        band = (rank >= start) & (rank < stop) & ~near
        total[band] = 1.0
        if plan.samples_by_leaf:
            continue
        here = plan.block_first[0, kv] // nk == level
        tiles, numbers = plan.block_rows[0, kv][here].long(), plan.block_sample[here].long()
        # A row in no tile of the level has no sample there: it gets one whose weights are all 0.
        none = len(samples)
        number = row.new_full((group * nq,), none)
        for tile, sample in zip(tiles, numbers, strict=True):
            number[tile[tile >= 0]] = sample
        padded = torch.nn.functional.pad(plan.sample_log_weight, (0, 0, 0, 1), value=-torch.inf)
        keys = torch.nn.functional.pad(samples, (0, 0, 0, 1))
        total += ~(band | near) * _counted(keys[number[row]], padded[number[row]], nk)
    return total.log()


def _counted(keys: Tensor, log_weight: Tensor, nk: int) -> Tensor:
    counts = torch.zeros(len(keys), nk, dtype=torch.float64, device=keys.device)
    return counts.scatter_add_(-1, keys, log_weight.double().exp())
