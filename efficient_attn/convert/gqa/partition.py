"""Which heads are to share one: partitions of the heads of a layer, as lists of their numbers.

What a group would lose is estimated from its pairs: with ``m`` heads, ``2 / m`` times the sum of
what each pair would lose alone. For averages judged by plain distance that is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch

Groups = list[list[int]]
Losses = list[list[float]]

RESTARTS = 20


def consecutive(count: int, groups: int) -> Groups:
    """Equal groups of neighbours (Ainslie et al., arXiv 2305.13245)."""
    size = count // groups
    return [list(range(start, start + size)) for start in range(0, count, size)]


def clustered(loss: Losses, groups: int) -> Groups:
    """Groups of any size, by merging the two whose union loses least until so many are left.

    Args:
        loss: What each pair of heads would lose, from :func:`pair_losses`.
        groups: How many.

    Source: Chen et al., Optimised Grouped-Query Attention Mechanism for Transformers (AsymGQA),
        arXiv 2406.14963, for groups of different sizes found by similarity of activations.
    """
    found = [[head] for head in range(len(loss))]
    while len(found) > groups:
        one, other = min(
            combinations(range(len(found)), 2),
            key=lambda pair: (
                _estimate(loss, found[pair[0]] + found[pair[1]])
                - _estimate(loss, found[pair[0]])
                - _estimate(loss, found[pair[1]])
            ),
        )
        found[one] += found.pop(other)
    return _in_order(found)


def searched(loss: Losses, groups: int, *, even: bool, seed: int = 0) -> Groups:
    """The best partition that moves and swaps of heads find from many starting points.

    Args:
        loss: What each pair of heads would lose, from :func:`pair_losses`.
        groups: How many.
        even: Whether all groups are to be of one size.
        seed: Of the starting points.

    Source: Joshi et al., QCQA: Quality and Capacity-aware Grouped Query Attention, arXiv
        2406.10247, whose evolutionary search has the variants for equal and for any sizes.
    """
    count = len(loss)
    generator = torch.Generator().manual_seed(seed)
    starts = [consecutive(count, groups)] if count % groups == 0 else []
    starts += [] if even else [clustered(loss, groups)]
    for _ in range(RESTARTS):
        order = torch.randperm(count, generator=generator).tolist()
        starts.append([order[g::groups] for g in range(groups)])
    ends = [_improved(loss, start, even) for start in starts]
    return _in_order(min(ends, key=lambda found: sum(_estimate(loss, group) for group in found)))


def pair_losses(count: int, cost: Callable[[list[int]], float]) -> Losses:
    """What each pair of ``count`` heads would lose if it shared one, as a symmetric square."""
    loss = [[0.0] * count for _ in range(count)]
    for one, other in combinations(range(count), 2):
        loss[one][other] = loss[other][one] = cost([one, other])
    return loss


def declared(assignment: Sequence[int], count: int, groups: int) -> Groups:
    """The groups that an assignment of each head to a group names.

    Raises:
        ValueError: There is not one entry for each head, or a group is empty or unknown.
    """
    found = [[h for h, group in enumerate(assignment) if group == g] for g in range(groups)]
    if len(assignment) != count or sum(map(len, found)) != count or not all(found):
        raise ValueError(
            f"partition is {list(assignment)}; it must name for each of {count} heads one of the "
            f"groups 0 to {groups - 1}, and no group may be empty."
        )
    return found


def _estimate(loss: Losses, group: list[int]) -> float:
    return sum(loss[one][other] for one in group for other in group) / len(group)


def _improved(loss: Losses, start: Groups, even: bool) -> Groups:
    """The first partition from ``start`` that no single move or swap betters."""
    groups = [list(group) for group in start]

    def better() -> bool:
        for one, other in combinations(range(len(groups)), 2):
            before = _estimate(loss, groups[one]) + _estimate(loss, groups[other])
            for changed in _neighbours(groups[one], groups[other], even):
                after = sum(_estimate(loss, group) for group in changed)
                if after < before - 1e-12 * abs(before):
                    groups[one], groups[other] = changed
                    return True
        return False

    while better():
        pass
    return groups


def _neighbours(one: list[int], other: list[int], even: bool):
    """Pairs of groups that differ from these by a swap of two heads, or a move of one."""
    for a in one:
        for b in other:
            yield [b if h == a else h for h in one], [a if h == b else h for h in other]
    if not even:
        for source, target, flipped in ((one, other, False), (other, one, True)):
            for a in source if len(source) > 1 else ():
                changed = [h for h in source if h != a], [*target, a]
                yield changed[::-1] if flipped else changed


def _in_order(groups: Groups) -> Groups:
    return sorted(sorted(group) for group in groups)
