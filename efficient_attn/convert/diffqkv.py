"""From grouped-query attention to DiffQKV: fewer key heads, the values as they are.

Key heads of a group are merged into one. Rotary embedding turns all of them alike, so per rotary
pair, seen as a complex number, each may be a complex multiple of the merged one: the multiple's
conjugate goes to the queries that read the head, before they are turned, and nothing is lost but
what is not a multiple.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.errors import ConversionError

Merge = Literal["mean", "select", "complex_svd"]
MERGES: tuple[Merge, ...] = ("mean", "select", "complex_svd")


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


def merge_key_heads(
    weights: GroupedAttentionWeights,
    num_key_heads: int,
    *,
    merge: Merge = "complex_svd",
    second_moment: Tensor | None = None,
) -> DiffQKVWeights:
    """Merge neighbouring key heads until ``num_key_heads`` are left.

    Args:
        weights: The source layer.
        num_key_heads: Divides the number of key heads of the source.
        merge: ``"mean"`` of the heads; ``"select"`` one of them, that from which the scores differ
            least; ``"complex_svd"``, per rotary pair the best complex multiple for every head.
        second_moment: Of the layer's input ``x``, ``E[x x^T]`` ``(D, D)``, or of ``[x, 1]``,
            ``(D + 1, D + 1)``, where projections have biases. Keys count by their size under it
            and by that of the queries that read them. By default, inputs are white.

    Source: ``complex_svd`` is the per-pair form of low-rank factors that commute with rotary
        embedding, as TransMLA (arXiv 2502.07864) has them across heads; ``mean`` is Ainslie et
        al., GQA, section 2.1, for keys alone.

    Raises:
        ConversionError: The heads cannot be merged so.
    """
    heads = weights.num_kv_heads
    if num_key_heads < 1 or heads % num_key_heads:
        raise ConversionError(
            f"{num_key_heads} key heads asked for; the source has {heads}, and they are merged in "
            f"groups of one size. Pass a divisor of {heads}."
        )
    if merge not in MERGES:
        raise ConversionError(f"merge is {merge!r}; it must be one of {', '.join(MERGES)}.")
    normed = weights.query_norm is not None or weights.key_norm is not None
    if num_key_heads < heads and normed and merge != "select":
        raise ConversionError(
            f"merge={merge!r} mixes key heads, and this layer normalises each of them after its "
            "projection. Pass merge='select'."
        )
    query = _with_bias(weights.query, weights.query_bias)
    key = _with_bias(weights.key, weights.key_bias)
    if num_key_heads < heads:
        query, key = _merge(weights, query, key, num_key_heads, merge, second_moment)
    has_query_bias = weights.query_bias is not None
    has_key_bias = weights.key_bias is not None
    return DiffQKVWeights(
        query=query[:, :-1] if has_query_bias else query,
        key=key[:, :-1] if has_key_bias else key,
        value=weights.value,
        output=weights.output,
        num_key_heads=num_key_heads,
        num_value_heads=heads,
        query_bias=query[:, -1] if has_query_bias else None,
        key_bias=key[:, -1] if has_key_bias else None,
        value_bias=weights.value_bias,
        output_bias=weights.output_bias,
    )


def pool_value_heads(
    layer: DiffQKVWeights,
    num_value_heads: int,
    *,
    second_moment: Tensor | None = None,
) -> DiffQKVWeights:
    """Replace neighbouring value heads by one whose linear images they are, as well as may be.

    Values are not turned, so each head of a group may be any matrix times the pooled one; the
    matrix goes to the output projection. The pooled head spans the leading principal directions
    of the group's values, weighted by what the output makes of them.

    Args:
        layer: What :func:`merge_key_heads` gives.
        num_value_heads: Divides the number of value heads.
        second_moment: As in :func:`merge_key_heads`.

    Raises:
        ConversionError: The heads cannot be pooled so.
    """
    heads = layer.num_value_heads
    if num_value_heads < 1 or heads % num_value_heads:
        raise ConversionError(
            f"{num_value_heads} value heads asked for; the layer has {heads}, and they are pooled "
            f"in groups of one size. Pass a divisor of {heads}."
        )
    if num_value_heads == heads:
        return layer
    value = _with_bias(layer.value, layer.value_bias).double()
    dim = value.shape[0] // heads
    group = heads // num_value_heads
    root = _root(second_moment, value, layer.value_bias is not None)
    output = rearrange(layer.output.double(), "e (h g d) -> h g e d", h=heads, d=dim)
    gram = torch.einsum("hged,hgef->hdf", output, output)
    pooled, outputs = [], []
    for first in range(0, heads, group):
        stack = value.view(heads, dim, -1)[first : first + group]
        factors = [_matrix_root(gram[first + member]) for member in range(group)]
        weighted = torch.cat([w @ v for (w, _), v in zip(factors, stack, strict=True)]) @ root[0]
        left, size, right = torch.linalg.svd(weighted, full_matrices=False)
        pooled.append(size[:dim, None] * right[:dim] @ root[1])
        ups = left[:, :dim].split(dim)
        for member, ((_, inverse), up) in enumerate(zip(factors, ups, strict=True)):
            outputs.append(output[first + member] @ (inverse @ up))
    out = rearrange(torch.stack(outputs), "h g e d -> e (h g d)")
    value = torch.cat(pooled)
    has_bias = layer.value_bias is not None
    return replace(
        layer,
        value=value[:, :-1] if has_bias else value,
        value_bias=value[:, -1] if has_bias else None,
        output=out,
        num_value_heads=num_value_heads,
    )


def _merge(
    weights: GroupedAttentionWeights,
    query: Tensor,
    key: Tensor,
    num_key_heads: int,
    merge: Merge,
    second_moment: Tensor | None,
) -> tuple[Tensor, Tensor]:
    groups = weights.num_kv_heads // num_key_heads
    dim = weights.head_dim
    keys = rearrange(key.double(), "(k g d) x -> k g d x", k=num_key_heads, g=groups)
    if merge == "mean":
        return query, keys.mean(1).flatten(0, 1)
    queries = rearrange(
        query.double(), "(k g q d) x -> k g q d x", k=num_key_heads, g=groups, d=dim
    )
    key_root = _root(second_moment, keys, weights.key_bias is not None)
    query_root = _root(second_moment, queries, weights.query_bias is not None)
    # How much each channel of each key head is asked for.
    asked = (queries @ query_root[0]).square().sum((2, 4)).clamp_min(1e-30)
    if merge == "select":
        seen = keys @ key_root[0]
        difference = (seen[:, :, None] - seen[:, None]).square().sum(-1)
        cost = torch.einsum("kijd,kid->kj", difference, asked)
        chosen = cost.argmin(1)
        return query, keys[torch.arange(num_key_heads), chosen].flatten(0, 1)
    pairs = len(weights.inverse_frequencies)
    merged, factors = _best_multiples(keys, asked, pairs, key_root)
    real, imaginary = queries[..., :pairs, :], queries[..., pairs : 2 * pairs, :]
    # The conjugate of each head's factor, on the queries that read it.
    a, b = (part[:, :, None, :, None] for part in (factors.real, factors.imag))
    queries = queries.clone()
    queries[..., :pairs, :] = a * real + b * imaginary
    queries[..., pairs : 2 * pairs, :] = a * imaginary - b * real
    if 2 * pairs < dim:
        shared, up = _best_subspace(keys[:, :, 2 * pairs :], asked[:, :, 2 * pairs :], key_root)
        merged[:, 2 * pairs :] = shared
        rest = queries[..., 2 * pairs :, :]
        queries[..., 2 * pairs :, :] = torch.einsum("kgcd,kgqcx->kgqdx", up, rest)
    return queries.flatten(0, 3), merged.flatten(0, 1)


def _best_multiples(
    keys: Tensor, asked: Tensor, pairs: int, root: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Merged keys ``(k, d, x)``, turned channels filled in, and factors ``(k, g, F)`` on them."""
    z = torch.complex(keys[:, :, :pairs], keys[:, :, pairs : 2 * pairs])
    importance = (asked[:, :, :pairs] + asked[:, :, pairs : 2 * pairs]).sqrt()
    weighted = torch.einsum("kgfx,kgf,xy->kfgy", z, importance, root[0].to(z.dtype))
    left, size, right = torch.linalg.svd(weighted, full_matrices=False)
    direction = right[..., 0, :] @ root[1].to(z.dtype)
    factors = rearrange(left[..., 0] * size[..., :1], "k f g -> k g f") / importance
    # Where the size of a product goes is free: merged keys get the mean size of their heads.
    gain = factors.abs().square().mean(1).sqrt().clamp_min(1e-30)
    factors = factors / gain[:, None]
    direction = direction * gain[..., None]
    merged = keys.new_zeros(len(keys), *keys.shape[2:])
    merged[:, :pairs], merged[:, pairs : 2 * pairs] = direction.real, direction.imag
    return merged, factors


def _best_subspace(
    keys: Tensor, asked: Tensor, root: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """For channels that are not turned: shared rows ``(k, c, x)``, maps to heads ``(k, g, c, c)``.

    Such channels may be mixed among themselves, not only scaled.
    """
    importance = asked.sqrt()
    weighted = rearrange(keys * importance[..., None] @ root[0], "k g c x -> k (g c) x")
    left, size, right = torch.linalg.svd(weighted, full_matrices=False)
    width = keys.shape[2]
    shared = size[:, :width, None] * right[:, :width] @ root[1]
    up = rearrange(left[..., :width], "k (g c) d -> k g c d", c=width) / importance[..., None]
    return shared, up


def _with_bias(matrix: Tensor, bias: Tensor | None) -> Tensor:
    return matrix if bias is None else torch.cat((matrix, bias[:, None]), 1)


def _root(second_moment: Tensor | None, rows: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """The square root of the inputs' second moment, as wide as ``rows``, and its inverse."""
    width = rows.shape[-1]
    if second_moment is None:
        eye = torch.eye(width, dtype=torch.float64, device=rows.device)
        return eye, eye
    moment = second_moment.double()
    if moment.shape[0] == width + 1 and not has_bias:
        moment = moment[:-1, :-1]
    if moment.shape != (width, width):
        inputs = "[x, 1], for there are biases," if has_bias else "x"
        raise ConversionError(
            f"second_moment has shape {tuple(second_moment.shape)}; that of {inputs} is "
            f"{(width, width)}."
        )
    return _matrix_root(moment)


def _matrix_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive matrix and its inverse, a little damped."""
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(0).add(1e-9 * values.clamp_min(0).mean().clamp_min(1e-300)).sqrt()
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT
