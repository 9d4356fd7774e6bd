"""From grouped-query attention to DiffQKV: fewer key heads, and values in groups of their own.

Key heads of a group become one. Rotary embedding turns all of them alike, so per rotary pair, seen
as a complex number, each may be a complex multiple of that one: the multiple's conjugate goes to
the queries that read the head, before they are turned, and nothing is lost but what is not a
multiple. Values are not turned: each may be any matrix times the shared one, and the matrix goes
to the output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.gqa.grouping import by_query_head, read_by_queries, written
from efficient_attn.convert.gqa.heads import Heads, heads_of
from efficient_attn.convert.gqa.moments import InputMoments, standard_moment
from efficient_attn.convert.gqa.partition import consecutive
from efficient_attn.convert.gqa.pooling import Pool, cost, fitted, mean
from efficient_attn.errors import ConversionError


@dataclass(frozen=True)
class DiffQKVWeights:
    """One DiffQKV layer; matrices are ``(out, in)``, and everything else is as in its source.

    Attributes:
        query: ``(H d, D)``, with bias or None.
        key: ``(num_key_heads d, D)``, with bias or None.
        value: ``(num_value_heads d, D)``, with bias or None.
        output: ``(D, H d)``, with bias or None.
        num_key_heads: Key heads, in even groups of query heads.
        num_value_heads: Value heads, in even groups of query heads.
        key_error: Share of the scores' mean square that is lost, in the moments given.
        value_error: The same of values as the output projection sees them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    num_key_heads: int
    num_value_heads: int
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    output_bias: Tensor | None = None
    key_error: float = 0.0
    value_error: float = 0.0


def select(heads: Heads) -> Pool:
    """One of the heads, that from which the scores of all differ least."""
    count = len(heads)
    eye = torch.eye(heads.dim, dtype=torch.float64, device=heads.second.device)
    chosen = torch.eye(count, dtype=torch.float64, device=eye.device)
    pools = [Pool(rearrange(eye[:, :, None] * row, "e d m -> e m d")) for row in chosen]
    return min(pools, key=partial(cost, heads))


MERGES: dict[str, Callable[[Heads], Pool]] = {
    "mean": mean,
    "select": select,
    "complex_svd": fitted,
}


def separate_heads(
    weights: GroupedAttentionWeights,
    num_key_heads: int,
    num_value_heads: int | None = None,
    *,
    merge: str = "complex_svd",
    moments: InputMoments | None = None,
) -> DiffQKVWeights:
    """Let neighbouring key heads share one, and neighbouring value heads, in groups of their own.

    With as many heads as there were, weights are returned as they are.

    Args:
        weights: The source layer.
        num_key_heads: Divides the number of heads of the source.
        num_value_heads: The same; by default all of them. What they share are the leading
            principal directions of the group, weighted by what the output makes of them.
        merge: What key heads share. ``"mean"`` of the heads; ``"select"``, one of them, from which
            the scores differ least; ``"complex_svd"``, per rotary pair the best complex multiple
            for every head, each weighted by the queries that read it.
        moments: Of the tokens that enter the layer. By default these count as uncorrelated, so
            that weights alone decide.

    Source: ``complex_svd`` is the per-pair form of low-rank factors that commute with rotary
        embedding, as TransMLA (arXiv 2502.07864) has them across heads; ``mean`` is Ainslie et
        al., GQA (arXiv 2305.13245), section 2.1, for keys alone.

    Raises:
        ConversionError: The heads cannot be shared so.
    """
    count, width = weights.num_kv_heads, weights.key.shape[1]
    num_value_heads = count if num_value_heads is None else num_value_heads
    for name, wanted in (("key", num_key_heads), ("value", num_value_heads)):
        if wanted < 1 or count % wanted:
            raise ConversionError(
                f"{wanted} {name} heads asked for; the source has {count}, and they are merged in "
                f"groups of one size. Pass a divisor of {count}."
            )
    if merge not in MERGES:
        raise ConversionError(f"merge is {merge!r}; it must be one of {', '.join(MERGES)}.")
    keys, values = heads_of(weights, standard_moment(width) if moments is None else moments.second)
    if num_key_heads < count and not keys.mixable and merge != "select":
        raise ConversionError(
            f"merge={merge!r} mixes key heads, and this layer normalises each of them after its "
            "projection. Pass merge='select'."
        )
    changed: dict[str, Tensor | None] = {}
    errors = {}
    for name, heads, wanted, share in (
        ("key", keys, num_key_heads, MERGES[merge]),
        ("value", values, num_value_heads, fitted),
    ):
        if wanted == count:
            continue
        groups = consecutive(count, wanted)
        pools = [share(heads[group]) for group in groups]
        lost = sum(cost(heads[group], pool) for group, pool in zip(groups, pools, strict=True))
        errors[f"{name}_error"] = lost / max(heads.energy, torch.finfo(torch.float64).tiny)
        for rows in (name, f"{name}_bias"):
            changed[rows] = written(_exact(getattr(weights, rows)), groups, pools, count)
        if any(pool.read is not None for pool in pools):
            changed |= _read(weights, name, by_query_head(pools, weights.num_heads // count))
    names = ("query", "key", "value", "output")
    kept = {rows: getattr(weights, rows) for name in names for rows in (name, f"{name}_bias")}
    return DiffQKVWeights(
        **kept | changed, num_key_heads=num_key_heads, num_value_heads=num_value_heads, **errors
    )


def _read(weights: GroupedAttentionWeights, name: str, read: Tensor) -> dict[str, Tensor | None]:
    """What reads shared heads: queries those of keys, the output projection those of values."""
    if name == "value":
        heads = rearrange(weights.output.double(), "o (h d) -> h o d", h=weights.num_heads)
        return {"output": rearrange(heads @ read, "h o d -> o (h d)")}
    order = torch.arange(weights.num_heads)
    return {
        rows: read_by_queries(_exact(getattr(weights, rows)), read, order, weights.num_heads)
        for rows in ("query", "query_bias")
    }


def _exact(rows: Tensor | None) -> Tensor | None:
    """In fp64, for everything to be rounded once."""
    return None if rows is None else rows.double()
