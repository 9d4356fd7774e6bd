"""What an estimate must give: the sampled rows of a plan, written out key by key in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import efficient_attn as ea
from bench.workloads import HYPER_CONFIGS, Inputs, Workload
from efficient_attn.planning.layout import leaf_range, near_keys


@dataclass(frozen=True)
class Estimate:
    """What a plan makes of scores, ``(rows, keys)``.

    Attributes:
        log_weight: How often each key counts, as a logarithm.
        is_exact: Which keys are not sampled.
        max_sample_mass: The most that the sampled ones weigh, as a multiple of the others.
    """

    log_weight: Tensor
    is_exact: Tensor
    max_sample_mass: float | None

    def weighted(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores with the weights, and which of their rows ``(..., rows, 1)`` met the limit."""
        scores = scores + self.log_weight.to(scores.dtype)
        if self.max_sample_mass is None:
            return scores, torch.zeros_like(scores[..., :1], dtype=torch.bool)
        exact, sampled = (
            scores.masked_fill(hidden, -torch.inf).logsumexp(-1, keepdim=True)
            for hidden in (~self.is_exact, self.is_exact)
        )
        excess = (sampled - exact - math.log(self.max_sample_mass)).clamp(min=0)
        return torch.where(self.is_exact, scores, scores - excess), excess > 0

    def mean(self, limited: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        """The mean of values that each key's gradient is relative to.

        In a row that met the limit, the masses of the two kinds of keys are in a fixed proportion:
        each kind has a softmax of its own.
        """
        of_all = (weights * values).sum(-1, keepdim=True)
        of_kind = of_all.new_zeros(weights.shape)
        for kind in (self.is_exact, ~self.is_exact):
            mass = (weights * kind).sum(-1, keepdim=True)
            mean = (weights * kind * values).sum(-1, keepdim=True) / torch.where(mass > 0, mass, 1)
            of_kind = torch.where(kind, mean, of_kind)
        return torch.where(limited, of_kind, of_all)


def estimate_of(workload: Workload, plan: ea.HyperPlan, heads: slice, rows: Tensor) -> Estimate:
    """That of the sampled rows, one head under the other."""

    def log_weights(plan: ea.HyperPlan) -> Tensor:
        numbers = range(heads.start, heads.stop)
        each = (log_multiplicity(plan, workload.num_queries, head, rows) for head in numbers)
        return torch.cat(list(each))

    log_weight = log_weights(plan)
    if not plan.is_sampled_by_leaf:
        return Estimate(log_weight, log_weight > -torch.inf, None)
    limit = HYPER_CONFIGS[workload.hyper].max_sample_mass
    return Estimate(log_weight, log_weights(plan.exact_part()) > -torch.inf, limit)


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
