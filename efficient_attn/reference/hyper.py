"""HyperAttention as the equations state it, from a plan and in any precision.

This is the specification: every other implementation is tested against it. It holds the whole
score matrix in memory, treats the plan as a constant and is differentiated by autograd.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from efficient_attn.planning import HyperPlan
from efficient_attn.planning.layout import leaf_range, near_keys, query_positions


def hyper_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: HyperPlan,
    *,
    scale: float | None = None,
    max_sample_mass: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The self-normalised estimate ``out_i = num_i / den_i``.

    ``num_i = sum_j W_ij exp(s_ij) v_j`` and ``den_i`` the same without ``v_j``, where
    ``s_ij = scale <q_i, k_j>`` and ``W_ij``, the :func:`multiplicity`, is 1 in expectation for
    every visible key. Han et al., "HyperAttention", arXiv 2310.05869, with sampling as in its
    experiments. With ``max_sample_mass`` the weights of a query's sample are made smaller, all by
    one factor, where they would give it more than so many times the mass of its exact keys.

    Shape:
        - query: ``(B, Hq, nq, D)``; key: ``(B, Hk, nk, D)``; value: ``(B, Hk, nk, Dv)``
        - out: ``(B, Hq, nq, Dv)``; lse: ``(B, Hq, nq)``, ``log den``
    """
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = rearrange(query, "b (h g) i d -> b h g i d", g=group)
    score = scale * torch.einsum("bhgid,bhjd->bhgij", query, key)
    weight = multiplicity(plan, query.shape[3], key.shape[2], group).to(score.dtype)
    if max_sample_mass is not None and plan.is_sampled_by_leaf:
        exact = multiplicity(plan.exact_part(), query.shape[3], key.shape[2], group)
        weight = _limited(weight, exact.to(score.dtype), score, max_sample_mass)

    # A row that sees nothing is computed on zeros, which keeps gradients finite, then put right.
    score = torch.where(weight > 0, score + weight.clamp(min=1e-30).log(), -torch.inf)
    blind = (weight == 0).all(-1, keepdim=True)
    score = score.masked_fill(blind, 0.0)
    lse = torch.logsumexp(score, dim=-1, keepdim=True)
    share = torch.exp(score - lse).masked_fill(blind, 0.0)
    out = torch.einsum("bhgij,bhjd->bhgid", share, value)
    lse = lse.masked_fill(blind, -torch.inf).squeeze(-1)
    return rearrange(out, "b h g i d -> b (h g) i d"), rearrange(lse, "b h g i -> b (h g) i")


def _limited(weight: Tensor, exact: Tensor, score: Tensor, limit: float) -> Tensor:
    """The weights, with what is sampled at most ``limit`` times as heavy as what is exact."""
    anchor = score.detach().masked_fill(weight == 0, -torch.inf).amax(-1, keepdim=True)
    anchor = anchor.masked_fill(anchor == -torch.inf, 0.0)
    mass = torch.where(weight > 0, score - anchor, 0.0).exp()
    most = limit * (exact * mass).sum(-1, keepdim=True)
    sampled = ((weight - exact) * mass).sum(-1, keepdim=True)
    over = sampled > most
    factor = torch.where(over, most / torch.where(over, sampled, 1.0), 1.0)
    return exact + factor * (weight - exact)


def multiplicity(plan: HyperPlan, nq: int, nk: int, group: int) -> Tensor:
    """How often each query counts each key, fp64 ``(B, Hk, G, nq, nk)``.

    Near keys count once, then those of the query's bands, then what is sampled: each of those keys
    counts for all that it was drawn from.
    """
    near = near_mask(plan, nq, nk).repeat(group, 1)
    total = near.double().expand(*plan.key_order.shape[:2], -1, -1)
    if plan.samples_by_leaf:
        total = total + ~near * _leaf_samples(plan, nq, nk).repeat(1, group, 1)
    for level in range(plan.key_order.shape[2]):
        band = band_mask(plan, level)
        total = torch.where(band & ~near, float(plan.block_rows.shape[2] > 0), total)
        if not plan.samples_by_leaf:
            total = total + ~(band | near) * _segment_samples(plan, level, nk)
    return rearrange(total, "b h (g i) j -> b h g i j", g=group)


def near_mask(plan: HyperPlan, nq: int, nk: int) -> Tensor:
    """Which keys are exact for a query wherever they are, ``(nq, nk)``."""
    device = plan.key_order.device
    key = torch.arange(nk, device=device)
    positions = query_positions(nq, nk, device)
    first, end = near_keys(positions, nk, plan.leaf_size, plan.window, plan.causal)
    near = (key < plan.sinks) | (key >= first.unsqueeze(-1)) & (key < end.unsqueeze(-1))
    return near & (key <= positions.unsqueeze(-1)) if plan.causal else near


def band_mask(plan: HyperPlan, level: int) -> Tensor:
    """Which keys lie in the band of ranks of each row at a level, ``(B, Hk, rows, nk)``."""
    rank = plan.key_rank[:, :, level].unsqueeze(-2)
    first, end = (x[:, :, level].unsqueeze(-1) for x in (plan.band_start, plan.band_end))
    return (rank >= first) & (rank < end)


def _leaf_samples(plan: HyperPlan, nq: int, nk: int) -> Tensor:
    """What the sample of each query's leaf says of each key, ``(Hk, nq, nk)``."""
    positions = query_positions(nq, nk, plan.key_order.device)
    first_leaf, _ = leaf_range(nq, nk, plan.leaf_size, plan.causal)
    leaf = torch.div(positions, plan.leaf_size, rounding_mode="floor") - first_leaf
    sees = (positions >= 0).unsqueeze(-1) if plan.causal else True
    return _sample_counts(plan, nk).index_select(1, leaf.clamp(min=0)) * sees


def _segment_samples(plan: HyperPlan, level: int, nk: int) -> Tensor:
    """What the sample of each row's segment at a level says of each key, ``(B, Hk, rows, nk)``."""
    counts = torch.nn.functional.pad(_sample_counts(plan, nk), (0, 0, 0, 1))
    num_heads, none = counts.shape[0], counts.shape[1] - 1
    num_rows = plan.band_start.shape[-1]
    here = (plan.block_rows >= 0) & (plan.block_first // nk == level).unsqueeze(-1)
    rows = torch.where(here, plan.block_rows, num_rows).flatten(2).long()
    sample = plan.block_sample.unsqueeze(-1).expand_as(plan.block_rows).flatten(2).long()
    number = sample.new_full((*rows.shape[:2], num_rows + 1), none).scatter_(-1, rows, sample)
    heads = torch.arange(num_heads, device=counts.device).unsqueeze(-1)
    return counts[heads, number[..., :-1]]


def _sample_counts(plan: HyperPlan, nk: int) -> Tensor:
    """The weight that each sample gives to each key, ``(Hk, S, nk)``."""
    weight = plan.sample_log_weight.double().exp().expand(plan.sample_keys.shape)
    counts = weight.new_zeros(*weight.shape[:2], nk)
    return counts.scatter_add(-1, plan.sample_keys.long(), weight)
