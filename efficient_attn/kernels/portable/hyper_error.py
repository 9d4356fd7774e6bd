"""How sure HyperAttention's estimate is: the standard error of each row's denominator.

With ``m`` draws, each of which stands for ``w`` keys and contributes ``w R`` to the denominator (0
where its key is counted exactly), its variance is estimated by the sampling theory of a total::

    (1 - 1/w) * m / (m - 1) * (sum (w R)^2 - (sum w R)^2 / m)

The first factor is the correction for sampling without replacement: a key that stands for itself
alone is certain. Both sums are attention over the sampled columns alone, the first of them with
scores and log weights doubled. What is drawn at different levels is independent, so variances add.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from efficient_attn.kernels.portable.hyper import Rows, attend, gather
from efficient_attn.kernels.portable.tiles import sampled_tiles
from efficient_attn.planning import HyperPlan


def error(query: Tensor, key: Tensor, lse: Tensor, *plan_and_scale) -> Tensor:
    """The ``hyper_attention_error`` op, as a share of the denominator, whose logarithm is ``lse``.

    Shape:
        - query: ``(B, Hq, nq, D)``; key: ``(B, Hk, nk, D)``, in even groups
        - lse, out: ``(B, Hq, nq)``
    """
    *fields, scale = plan_and_scale
    plan = HyperPlan(*fields)
    total, draws = lse.numel(), plan.sample_keys.shape[-1]
    log_variance = lse.new_full((total + 1,), -torch.inf)
    if draws == 0:
        return torch.zeros_like(lse)
    q, k = Rows.of(query), Rows.of(key)
    for rows, keys, bias in sampled_tiles(plan, query, key):
        tile_q, tile_k = gather(q, rows.clamp(max=total - 1)), gather(k, keys)
        _, log_sum = attend(tile_q, tile_k, tile_k, bias, False, scale)
        _, log_squares = attend(tile_q, tile_k, tile_k, 2 * bias, False, 2 * scale)
        uncertain = (1 - torch.exp(-bias.amax(-1))).clamp(min=0).to(lse.dtype)
        part = log_squares + uncertain.log()
        if draws > 1:
            # By Cauchy and Schwarz the ratio is at most 1, but for rounding.
            even = torch.exp((2 * log_sum - log_squares).nan_to_num(nan=0.0)) / draws
            part = part + torch.log1p(-even.clamp(max=1)) + math.log(draws / (draws - 1))
        index = rows.flatten()
        before = log_variance.index_select(0, index)
        log_variance.index_copy_(0, index, torch.logaddexp(before, part.flatten()))
    log_variance = log_variance[:-1].view(lse.shape)
    certain = log_variance == -torch.inf
    return torch.exp(log_variance / 2 - lse).masked_fill(certain, 0.0)
