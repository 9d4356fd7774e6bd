"""Fewer key and value heads for a layer that has more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.gqa import partition as partitions
from efficient_attn.convert.gqa.heads import heads_of
from efficient_attn.convert.gqa.moments import InputMoments, standard_moment
from efficient_attn.convert.gqa.pooling import POOLINGS, Pool, cost, pool
from efficient_attn.head_map import HeadMap

PARTITIONS = ("consecutive", "clustered", "searched", "searched-even")


@dataclass(frozen=True)
class GroupedLayer:
    """A layer with fewer key and value heads.

    Attributes:
        weights: Its weights. Query heads are in such an order that those of one group are
            neighbours; ``num_kv_heads`` counts the heads that are left.
        head_map: Which of these each query head reads; without indices where groups are even.
        groups: The heads of the source that each head stands for.
        query_order: ``(H,)``, the query heads of the source in their new order.
        key_error: Share of the scores' mean square that is lost, in the moments given.
        value_error: The same of values as the output projection sees them.
    """

    weights: GroupedAttentionWeights
    head_map: HeadMap
    groups: tuple[tuple[int, ...], ...]
    query_order: Tensor
    key_error: float
    value_error: float

    @property
    def group_sizes(self) -> list[int]:
        """Query heads of each head that is left."""
        share = self.weights.num_heads // sum(map(len, self.groups))
        return [share * len(group) for group in self.groups]

    @property
    def is_even(self) -> bool:
        """Whether any code for grouped-query attention can run the layer."""
        return self.head_map.q_to_k is None


def group_layer(
    weights: GroupedAttentionWeights,
    num_kv_heads: int,
    *,
    partition: str | Sequence[int] = "searched-even",
    pooling: str = "fitted",
    moments: InputMoments | None = None,
    seed: int = 0,
) -> GroupedLayer:
    """Let groups of the key and value heads of a layer share one head each.

    What is done to a shared head is undone in queries and in the output projection where that is
    possible without changing the layer, so a group of equal heads, or of heads that only differ by
    what can be undone, loses nothing. With as many heads as there were, weights are returned as
    they are.

    Args:
        weights: The layer, in even groups already or with a key head for each query head.
        num_kv_heads: How many heads are to be left.
        partition: ``"consecutive"``: neighbours; ``"clustered"``: similar heads, in groups of any
            size; ``"searched"``: the best groups that a search finds, of any size;
            ``"searched-even"``: of one size, which code for grouped-query attention knows; or the
            number of a group for each source head.
        pooling: ``"mean"``, ``"first"``, ``"norm"``, ``"aligned"``, ``"svd"`` or ``"fitted"``.
        moments: Of tokens that enter the layer. By default these count as uncorrelated, so that
            weights alone decide.
        seed: Of the search.

    Raises:
        ValueError: The number of heads does not fit, or a name is unknown.
    """
    count = weights.num_kv_heads
    check_grouping(count, num_kv_heads, partition, pooling)
    width = weights.key.shape[1]
    second = standard_moment(width) if moments is None else moments.second
    kinds = heads_of(weights, second)
    energies = [max(heads.energy, torch.finfo(torch.float64).tiny) for heads in kinds]

    def loss(group: list[int]) -> float:
        return sum(
            cost(part, pool(part, pooling)) / energy
            for part, energy in zip((heads[group] for heads in kinds), energies, strict=True)
        )

    groups = _groups(count, num_kv_heads, partition, loss, seed)
    pools = [[pool(heads[group], pooling) for group in groups] for heads in kinds]
    errors = [
        sum(cost(heads[group], each) for group, each in zip(groups, found, strict=True)) / energy
        for heads, found, energy in zip(kinds, pools, energies, strict=True)
    ]
    share = weights.num_heads // count
    order = torch.tensor([h * share + i for group in groups for h in group for i in range(share)])
    sizes = [share * len(group) for group in groups]
    even = len(set(sizes)) == 1
    return GroupedLayer(
        weights=_assemble(weights, groups, *pools, order),
        head_map=HeadMap.gqa(weights.num_heads, num_kv_heads)
        if even
        else HeadMap.from_group_sizes(sizes),
        groups=tuple(map(tuple, groups)),
        query_order=order,
        key_error=errors[0],
        value_error=errors[1],
    )


def _groups(
    count: int,
    num_kv_heads: int,
    partition: str | Sequence[int],
    loss: Callable[[list[int]], float],
    seed: int,
) -> partitions.Groups:
    if not isinstance(partition, str):
        return partitions.declared(partition, count, num_kv_heads)
    if partition == "consecutive" or num_kv_heads in (1, count):
        return partitions.consecutive(count, num_kv_heads)
    losses = partitions.pair_losses(count, loss)
    if partition == "clustered":
        return partitions.clustered(losses, num_kv_heads)
    even = partition == "searched-even"
    candidates = [partitions.searched(losses, num_kv_heads, even=even, seed=seed)]
    if not even:
        candidates.append(partitions.clustered(losses, num_kv_heads))
    if count % num_kv_heads == 0:
        candidates.append(partitions.consecutive(count, num_kv_heads))
    # The search goes by an estimate; this is what counts.
    return min(candidates, key=lambda groups: sum(map(loss, groups)))


def _assemble(
    weights: GroupedAttentionWeights,
    groups: partitions.Groups,
    key_pools: list[Pool],
    value_pools: list[Pool],
    order: Tensor,
) -> GroupedAttentionWeights:
    """Fold what heads are made of into their projections, and how they are read into the others."""
    count = weights.num_kv_heads
    share = weights.num_heads // count
    if len(groups) == count and groups == sorted(groups):
        return weights
    changed = {"num_kv_heads": len(groups)}
    for name, pools in (("key", key_pools), ("value", value_pools)):
        changed[name] = written(getattr(weights, name), groups, pools, count)
        changed[f"{name}_bias"] = written(getattr(weights, f"{name}_bias"), groups, pools, count)
    key_read, value_read = (
        by_query_head(pools, share) if any(p.read is not None for p in pools) else None
        for pools in (key_pools, value_pools)
    )
    for name in ("query", "query_bias"):
        changed[name] = read_by_queries(getattr(weights, name), key_read, order, weights.num_heads)
    per_head = rearrange(weights.output, "o (h d) -> h o d", h=weights.num_heads)[order]
    if value_read is not None:
        per_head = per_head.double() @ value_read
    changed["output"] = _like(rearrange(per_head, "h o d -> o (h d)"), weights.output)
    return replace(weights, **changed)


def written(
    rows: Tensor | None, groups: partitions.Groups, pools: list[Pool], count: int
) -> Tensor | None:
    """The rows of a projection, or of its bias, of the heads that are left."""
    if rows is None:
        return None
    per_head = rows.double().view(count, -1, *rows.shape[1:])
    shared = [
        torch.einsum("emd,md...->e...", pool.write, per_head[group])
        if len(group) > 1
        else per_head[group[0]]
        for group, pool in zip(groups, pools, strict=True)
    ]
    return _like(torch.cat(shared), rows)


def read_by_queries(
    rows: Tensor | None, read: Tensor | None, order: Tensor, heads: int
) -> Tensor | None:
    """The rows of the query projection, or of its bias, for key heads that are read by ``read``."""
    if rows is None:
        return None
    per_head = rows.view(heads, -1, *rows.shape[1:])[order]
    if read is not None:
        per_head = torch.einsum("hde,hd...->he...", read, per_head.double())
    return _like(per_head.flatten(0, 1), rows)


def by_query_head(pools: list[Pool], share: int) -> Tensor:
    """How each query head, in the new order, reads its head: ``(H, d, d)``.

    Args:
        pools: Of all groups.
        share: Query heads of each head of the source.
    """
    found = []
    for each in pools:
        dim, count, _ = each.write.shape
        eye = torch.eye(dim, dtype=torch.float64, device=each.write.device)
        found.append(eye.expand(count, -1, -1) if each.read is None else each.read)
    return torch.cat(found).repeat_interleave(share, dim=0)


def _like(x: Tensor, original: Tensor) -> Tensor:
    return x.to(original.dtype).contiguous()


def check_grouping(count: int, wanted: int, partition: str | Sequence[int], pooling: str) -> None:
    """Refuse with a ValueError what :func:`group_layer` cannot do to ``count`` heads."""
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= count:
        raise ValueError(
            f"num_kv_heads is {wanted!r}; the layer has {count} key/value heads, so it must be a "
            f"whole number from 1 to {count}."
        )
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; accepted: {', '.join(map(repr, POOLINGS))}.")
    if not isinstance(partition, str):
        return
    if partition not in PARTITIONS:
        raise ValueError(
            f"partition is {partition!r}; accepted: {', '.join(map(repr, PARTITIONS))}, or the "
            "number of a group for each head."
        )
    if partition in ("consecutive", "searched-even") and count % wanted:
        raise ValueError(
            f"{count} heads do not divide evenly into {wanted} groups, which partition "
            f'{partition!r} makes. Use "clustered" or "searched", or name the group of each head.'
        )
