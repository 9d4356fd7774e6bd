"""Other heads for a grouped model that compute the same: fewer of them, or even groups.

None of these changes a result. They change what is stored, and who can load it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from efficient_attn.convert.gqa import group_layer
from efficient_attn.integrations.attention_sites import attention_sites
from efficient_attn.integrations.grouping import (
    GroupingReport,
    replace_layers,
    tell_transformers,
)
from efficient_attn.integrations.site import Site


def prune_empty_heads(model: nn.Module) -> dict[str, int]:
    """Drop key and value heads that no query head reads, in place; how many, by layer.

    Key-driven layers, which must be frozen, become
    :class:`~efficient_attn.layers.GroupedQueryAttention` with a map.

    Args:
        model: Holds layers of this package.

    Raises:
        UnsupportedError: There is no layer of a known kind, or one is not frozen. The model is as
            it was.
    """
    dropped = {}
    for name, site in attention_sites(model, uneven=True).items():
        sizes = site.group_sizes
        kept = [head for head, size in enumerate(sizes) if size]
        dropped[name] = len(sizes) - len(kept)
        if dropped[name]:
            site.pick(model, kept, [sizes[head] for head in kept])
    return dropped


def export_even_groups(model: nn.Module) -> dict[str, int]:
    """Make groups even by repeating heads, in place; how many there are then, by layer.

    With ``r`` the largest number that divides the sizes of all groups, each serves ``r`` query
    heads. So stock classes and engines can run the model, at the price of a larger cache; with
    ``r = 1`` that of multi-head attention. Heads that nobody reads are dropped.

    Args:
        model: Holds layers of transformers or of this package, with uneven groups.

    Raises:
        UnsupportedError: There is no layer of a known kind, or one is not frozen. The model is as
            it was.
    """
    sites = attention_sites(model, uneven=True)
    before = {name: site.group_sizes for name, site in sites.items()}
    # One number of heads for all layers, which is what a configuration can say.
    share = math.gcd(*(size for sizes in before.values() for size in sizes))
    after = {}
    for name, site in sites.items():
        heads = [h for h, size in enumerate(before[name]) for _ in range(size // share)]
        after[name] = [share] * len(heads)
        site.pick(model, heads, after[name])
    tell_transformers(model, sites, after)
    return {name: len(sizes) for name, sizes in after.items()}


def collapse_equal_heads(model: nn.Module) -> GroupingReport:
    """Let key and value heads that are equal to the bit share one, in place.

    The inverse of :func:`export_even_groups`, and for checkpoints that were grouped without being
    made smaller. Query heads are reordered where equal heads are not neighbours.

    Args:
        model: As :func:`~efficient_attn.integrations.grouping.group_heads` takes it.

    Raises:
        UnsupportedError: There is no layer of a known kind.
    """
    sites, grouped = attention_sites(model), {}
    for name, site in sites.items():
        groups = _equal_heads(site)
        options = {"partition": groups, "pooling": "first"}
        grouped[name] = group_layer(site.weights(), max(groups) + 1, **options)
    return replace_layers(model, sites, grouped, None)


def _equal_heads(site: Site) -> list[int]:
    """A number for each head, the same for equal ones, in the order of the first of each."""
    weights, found, numbers = site.weights(), [], []
    parts = (weights.key, weights.key_bias, weights.value, weights.value_bias)
    rows = [x.unflatten(0, (site.num_kv_heads, -1)) for x in parts if x is not None]
    for head in range(site.num_kv_heads):
        own = [x[head] for x in rows]
        same = (i for i, other in enumerate(found) if _all_equal(own, other))
        number = next(same, len(found))
        if number == len(found):
            found.append(own)
        numbers.append(number)
    return numbers


def _all_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
