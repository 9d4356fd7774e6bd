"""Which keys are sampled, and how much each of them counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from efficient_attn.planning.counter import random_below
from efficient_attn.planning.layout import Problem, leaf_range, near_keys

_STREAM = 1


def leaf_samples(
    config, nq: int, nk: int, num_heads: int, causal: bool, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A sample for every leaf, from the keys that are neither sinks nor near to it.

    Shape:
        - keys: ``(Hk, leaves, m)``, int32; log_weight: ``(leaves, m)``, fp32
    """
    first_leaf, num_leaves = leaf_range(nq, nk, config.leaf_size, causal)
    leaf = torch.arange(num_leaves, device=device) + first_leaf
    first, end = near_keys(leaf * config.leaf_size, nk, config.leaf_size, config.window, causal)
    sinks = min(config.sinks, nk)
    first = first.clamp(min=sinks)
    # Under a causal mask nothing behind the near keys is visible.
    gap = nk - first if causal else end.clamp(min=sinks) - first
    frame = (nk - sinks - gap).clamp(min=0)
    number = leaf if config.own_samples else torch.zeros_like(leaf)
    drawn, log_weight = _draw(config, frame, number, num_heads, seed, device)
    drawn = drawn + sinks
    drawn = drawn + gap.unsqueeze(-1) * (drawn >= first.unsqueeze(-1))
    return drawn.clamp(max=nk - 1).int(), log_weight


def segment_samples(
    config, problems: list[Problem], num_heads: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A sample for every problem, from its segment of keys.

    Shape:
        - keys: ``(Hk, problems, m)``, int32; log_weight: ``(problems, m)``, fp32
    """
    table = [(p.keys[0], p.keys[1] - p.keys[0], p.level << 20 | p.keys[0]) for p in problems]
    first, frame, number = torch.tensor(table, device=device).reshape(-1, 3).unbind(-1)
    drawn, log_weight = _draw(config, frame, number, num_heads, seed, device)
    return (drawn + first.unsqueeze(-1)).int(), log_weight


def _draw(config, frame, number, num_heads, seed, device) -> tuple[Tensor, Tensor]:
    """``m`` of the integers below each frame, and the logarithm of what each stands for.

    Without replacement, a frame is cut into ``m`` intervals and each gives one integer, which
    stands for the size of its interval. An empty interval stands for nothing.
    """
    size = config.sample_size
    frame, number = frame.unsqueeze(-1), number.unsqueeze(-1)
    heads = torch.arange(num_heads, device=device).view(-1, 1, 1)
    turn = torch.arange(size, device=device)
    if config.replacement:
        drawn = random_below(frame, seed, _STREAM, heads, number, turn)
        log_weight = frame.float().log().expand(-1, size) - math.log(max(size, 1))
        return drawn, log_weight
    start, stop = turn * frame // max(size, 1), (turn + 1) * frame // max(size, 1)
    drawn = start + random_below(stop - start, seed, _STREAM, heads, number, turn)
    return drawn.clamp(max=(frame - 1).clamp(min=0)), (stop - start).float().log()
