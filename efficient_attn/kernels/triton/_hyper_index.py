"""Which parts of a plan meet a key, found by torch's own sorting and searching on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.planning import HyperPlan


def meeting_tiles(plan: HyperPlan, columns: int) -> tuple[Tensor, Tensor]:
    """The tiles ``[begin, end)`` that meet each block of ``columns`` ranks.

    Shape:
        - begin, end: ``(B, Hk, L * blocks)``, int32
    """
    *planes, levels, nk = plan.key_order.shape
    device = plan.block_first.device
    begin = torch.arange(0, nk, columns, device=device)
    level = torch.arange(levels, device=device).unsqueeze(-1) * nk
    end = ((begin + columns).clamp(max=nk) + level).flatten()
    begin = (begin + level).flatten()
    if plan.block_first.shape[-1] == 0:
        return (begin.new_zeros(*planes, len(begin), dtype=torch.int32),) * 2
    # Tiles without rows that come last are left out, others have their place in the order.
    has_rows = plan.block_rows[..., :1].ge(0).any(-1)
    number = torch.arange(1, has_rows.shape[-1] + 1, device=device)
    last = (has_rows * number).amax(-1, keepdim=True)
    first = plan.block_first.cummax(-1).values
    bounds = (begin - plan.block_size, end - 1)
    bounds = (x.int().expand(*planes, -1).contiguous() for x in bounds)
    found = (torch.searchsorted(first, x, right=True) for x in bounds)
    begin, end = (torch.minimum(x, last).int() for x in found)
    return begin, end


def tiles_of_segments(plan: HyperPlan) -> tuple[Tensor, Tensor]:
    """The tiles ``[begin, end)`` whose sample each is, ``(S,)``, if samples are not by leaf."""
    number = torch.arange(
        plan.sample_keys.shape[1], device=plan.sample_keys.device, dtype=torch.int32
    )
    begin, end = (torch.searchsorted(plan.block_sample, number, right=x) for x in (False, True))
    return begin.int(), end.int()


def places_by_key(plan: HyperPlan) -> tuple[Tensor, Tensor]:
    """The places in all samples in the order of the keys there, and where those of a key begin.

    Shape:
        - order: ``(Hk, S * m)``; starts: ``(Hk, nk + 1)``; int32
    """
    drawn, order = torch.sort(plan.sample_keys.flatten(1), stable=True)
    nk = plan.key_order.shape[-1]
    key = torch.arange(nk + 1, device=drawn.device, dtype=torch.int32)
    starts = torch.searchsorted(drawn, key.expand(len(drawn), -1).contiguous())
    return order.int(), starts.int()
