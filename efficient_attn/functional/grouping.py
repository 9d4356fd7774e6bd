"""Key-driven grouping: the norms of the key heads decide how many query heads each serves."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from efficient_attn.functional import _contract as contract

Normalization = Literal["sum", "minmax"]
Rounding = Literal["remainder", "nearest"]
Flavor = Literal["ema", "difference"]


def key_norms(key: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
    """The Frobenius norm of every key head of every sample, over tokens and width.

    Padding does not count, and what stands there is never read. The order of the sum is fixed: the
    same tokens give the same norms. No gradient flows. A rotary embedding does not change a norm;
    a normalisation of the keys leaves nothing to see, so take norms before it.

    Args:
        key: The key heads.
        key_lengths: How many leading tokens of each sample count; by default all.

    Shape:
        - key: ``(B, G, N, D)``; key_lengths: ``(B,)``
        - output: ``(B, G)``, fp32

    Raises:
        ValueError: A shape does not fit.
        TypeError: A dtype or a kind does not fit.
    """
    if not isinstance(key, Tensor) or not key.is_floating_point():
        kind = key.dtype if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(f"key is of kind {kind}; pass a floating tensor of key heads.")
    if key.dim() != 4:
        raise ValueError(
            f"key has shape {tuple(key.shape)}; it must be (batch, heads, tokens, dim)."
        )
    contract.check_key_lengths(key_lengths, key)
    return torch.ops.efficient_attn.key_norms(key.detach(), key_lengths)


def allocate_heads(
    scores: Tensor,
    num_heads: int,
    *,
    min_queries: int = 0,
    normalization: Normalization = "sum",
    rounding: Rounding = "remainder",
) -> tuple[Tensor, Tensor]:
    """Cut the query heads into contiguous groups, one for each key head, by scores.

    Everything stays on the device of the scores, and nothing waits for it. The result depends on
    the scores alone, so that one compiled program or CUDA graph serves all of them.

    Scores that tell nothing (equal to one part in a million, negative, NaN, infinite, or only one)
    give even groups, the first of which take what does not divide.

    Source: Khan et al., Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention,
    arXiv 2408.08454. Its code is ``rounding="nearest"``, with ``normalization="minmax"`` for KDGQA.

    Args:
        scores: Norms of the key heads, or what became of them.
        num_heads: Number of query heads ``Hq``.
        min_queries: How many query heads a group has at least.
        normalization: ``"sum"``: shares are scores over their sum. ``"minmax"``: the same after the
            lowest score was moved to 0 and the highest to 1, so that the lowest gets no more than
            ``min_queries``, however little scores differ.
        rounding: ``"remainder"``: round down, then one more for the largest remainders.
            ``"nearest"``: round half to even, then take from the largest group or give to the
            smallest until the sum is right. Ties go to the first.

    Returns:
        ``(sizes, index)``: how many query heads each group has, and the group of each query head.

    Shape:
        - scores: ``(G,)``, or ``(B, G)`` with one row per sample
        - sizes: as scores, int32; index: ``(Hq,)`` or ``(B, Hq)``, int32

    Raises:
        ValueError: A shape or a number does not fit.
        TypeError: The scores are not floating.

    Example:
        >>> sizes, index = allocate_heads(torch.tensor([1.0, 2.0, 3.0]), 6)
        >>> sizes.tolist(), index.tolist()
        ([1, 2, 3], [0, 1, 1, 2, 2, 2])
        >>> head_map = HeadMap.from_index(index, num_k_heads=3)
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores is of kind {kind}; pass a floating tensor, one for each key head.")
    if scores.dim() not in (1, 2) or scores.shape[-1] == 0:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}; it must be (key heads,) or "
            "(batch, key heads), with at least one key head."
        )
    check_grouping(scores.shape[-1], num_heads, min_queries, normalization, rounding)
    rows = scores.detach().float().reshape(-1, scores.shape[-1])
    sizes, index = torch.ops.efficient_attn.allocate_heads(
        rows, num_heads, min_queries, normalization == "minmax", rounding == "nearest"
    )
    return (sizes[0], index[0]) if scores.dim() == 1 else (sizes, index)


def ema_scores(
    norms: Tensor, memory: Tensor, updates: Tensor, *, beta: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Scores of DGQA by an exponential moving average of the norms, corrected for its beginning.

    ``memory' = beta memory + (1 - beta) norms``, ``scores = memory' / (1 - beta^(updates + 1))``.

    Args:
        norms: Norms of the key heads, now.
        memory: What this function returned the last time; zeros at first.
        updates: How many times it was called before, a tensor.
        beta: Weight of the past.

    Returns:
        ``(scores, memory)``.
    """
    memory = beta * memory + (1.0 - beta) * norms
    return memory / (1.0 - beta ** (updates + 1)), memory


def difference_scores(norms: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of DGQA by how much each norm has changed since the last time.

    Args:
        norms: Norms of the key heads, now.
        memory: What this function returned the last time; zeros at first, when the scores are the
            norms.

    Returns:
        ``(scores, memory)``.
    """
    return (norms - memory).abs(), norms


def khan2024_scores(
    norms: Tensor, memory: Tensor, *, flavor: Flavor, window: int
) -> tuple[Tensor, Tensor]:
    """Scores of DGQA as its authors' code has them, where the window also divides the memory.

    With their window of 300 the memory is next to nothing, and both flavors are proportional to the
    norms of the moment.

    Args:
        norms: Norms of the key heads, now, summed over the batch.
        memory: What this function returned the last time; zeros at first.
        flavor: ``"ema"`` or ``"difference"``.
        window: Steps between two calls.

    Returns:
        ``(scores, memory)``.
    """
    scores = 0.9 * norms + (1.0 - 0.9) * memory if flavor == "ema" else (memory - norms).abs()
    return scores, (memory + norms) / window


def is_recomputed(like: Tensor) -> Tensor:
    """Whether activation checkpointing runs a forward again, which it does inside of a backward.

    A tensor beside ``like``, so that compiled code finds out each time it runs.
    """
    return torch.ops.efficient_attn.is_recomputed(like)


def check_grouping(
    num_groups: int, num_heads: int, min_queries: int, normalization: str, rounding: str
) -> None:
    """Refuse what :func:`allocate_heads` cannot do, before there are scores."""
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; it must be at least 1.")
    if not 0 <= min_queries * num_groups <= num_heads:
        raise ValueError(
            f"min_queries is {min_queries}; {num_groups} key heads can have at least 0 to "
            f"{num_heads // num_groups} each of {num_heads} query heads."
        )
    check_choice("normalization", normalization, ("sum", "minmax"))
    check_choice("rounding", rounding, ("remainder", "nearest"))


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """An option is one of a few."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, choices))}.")
