"""HyperAttention: softmax attention estimated in near-linear time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from efficient_attn.config import HyperConfig
from efficient_attn.functional import _contract as contract
from efficient_attn.functional._hyper_heads import even_heads
from efficient_attn.functional._hyper_limit import estimate
from efficient_attn.functional._hyper_ragged import each_sample, each_sequence
from efficient_attn.head_map import HeadMap
from efficient_attn.masking import window_limits
from efficient_attn.planning import HyperPlan, make_plan

_DEFAULT = HyperConfig()


def hyper_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    config: HyperConfig = _DEFAULT,
    seed: int = 0,
    plan: HyperPlan | None = None,
    head_map: HeadMap | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    return_error: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax attention in which most keys are represented by a weighted sample.

    Each query attends exactly to keys near it and to a block of keys with a similar hash, and to a
    sample of the others whose weights make the softmax denominator, and the numerator, right on
    average. The output, their ratio, is not exact. Which keys these are is decided by
    :func:`hyper_plan`; given the plan, the result is an ordinary differentiable function, whose
    gradients through ``out`` and ``lse`` are exact and the same bits from run to run.

    After Han et al., "HyperAttention: Long-context Attention in Near-Linear Time", arXiv
    2310.05869.

    Args:
        query: Queries. Any strides are accepted, here and below.
        key: Keys.
        value: Values.
        causal: Hide later keys. Aligned to the lower right corner: the last query sees every key.
            The plan of the default structure never depends on what is hidden; that of
            :meth:`HyperConfig.paper` does.
        scale: Factor on the scores; by default ``D ** -0.5``.
        config: How keys are chosen, and below which length the result is exact.
        seed: Fixes everything random, together with the position of a head and of its tokens. Give
            each layer its own.
        plan: The result of :func:`hyper_plan`, to be used in place of ``config`` and ``seed``.
        head_map: Which key and value head each query head reads; by default even groups. Groups
            that are not even, or not alike for keys and values, are written out to more heads.
        key_lengths: Number of valid keys per sample, as in :func:`attention`; each sample is
            computed by itself.
        return_lse: Return the estimated log-sum-exp of the scores too.
        return_error: Return also the standard error of each row's softmax denominator, as a share
            of it: about that of ``lse``. It is itself estimated, from the sample, and blind to what
            no sample has met; drawing with replacement it is too small by a factor of
            ``sqrt(1 - sample_size / keys)``. Zero for a head that is exact, and only there or where
            a row sees nothing that is sampled. It has no gradient.

    Returns:
        ``out``, or a tuple of ``out`` and then ``lse`` and the error, as asked for. A query that
        sees no key gives zeros and ``lse = -inf``.

    Shape:
        - query: ``(B, Hq, Nq, D)``; key: ``(B, Hk, Nk, D)``; value: ``(B, Hv, Nk, Dv)``
        - key_lengths: ``(B,)``
        - out: ``(B, Hq, Nq, Dv)``; lse: ``(B, Hq, Nq)``, natural logarithm, fp32 (fp64 for fp64)
        - error: ``(B, Hq, Nq)``, in the dtype of ``lse``

    Raises:
        ValueError: A shape, a length, the head map or the plan does not fit.
        TypeError: A dtype or a kind does not fit.

    Example:
        >>> query, key, value = torch.randn(3, 1, 2, 8192, 64)
        >>> hyper_attention(query, key, value, causal=True).shape
        torch.Size([1, 2, 8192, 64])
    """
    contract.check_tensors(query, key, value, ("batch", "heads", "tokens", "dim"))
    _check_options(config, seed, plan)
    contract.check_key_lengths(key_lengths, key)
    maps = contract.resolve_map(head_map, query, key, value, heads=1, rows=query.shape[0])
    if key_lengths is not None:
        if plan is not None:
            raise ValueError(
                "plan and key_lengths were both given, but a plan is for samples of one length; "
                "pass config and seed instead."
            )
        results = each_sample(
            hyper_attention, query, key, value, key_lengths, head_map, return_error,
            causal=causal, scale=scale, config=config, seed=seed,
        )  # fmt: skip
        return _asked_for(results, (True, return_lse, return_error))
    scale = contract.resolve_scale(scale, query)
    even_key, even_value = even_heads(query, key, value, *maps)
    if plan is None:
        plan = make_plan(query, even_key, causal=causal, config=config, seed=seed)
    _check_plan(plan, query, even_key, causal)
    if plan.is_exact:
        window = window_limits(causal, None)
        out, lse = torch.ops.efficient_attn.attention(
            query, key, value, *maps, None, None, *window, scale, 0.0
        )
        error = torch.zeros_like(lse) if return_error else None
    else:
        limit = config.max_sample_mass
        out, lse, estimated_lse = estimate(query, even_key, even_value, plan, scale, limit)
        error = None
        if return_error or config.max_error is not None:
            detached = (x.detach() for x in (query, even_key, estimated_lse))
            error = torch.ops.efficient_attn.hyper_attention_error(*detached, *plan, scale)
        if config.max_error is not None:
            out, lse, error = _exact_over_budget(
                query, even_key, even_value, out, lse, error, causal, scale, config.max_error
            )
    return _asked_for((out, lse, error), (True, return_lse, return_error))


def _exact_over_budget(query, key, value, out, lse, error, causal, scale, budget):
    """The heads of which a tenth of the rows are less certain than the budget, computed exactly."""
    rank = max(1, math.ceil(0.9 * error.shape[-1]))
    over = error.kthvalue(rank, dim=-1).values > budget
    out, lse, error = out.clone(), lse.clone(), error.masked_fill(over.unsqueeze(-1), 0.0)
    group = query.shape[1] // key.shape[1]
    for sample in over.any(-1).nonzero().flatten().tolist():
        heads = over[sample].nonzero().flatten()
        k, v = (x[sample : sample + 1, heads // group] for x in (key, value))
        exact = torch.ops.efficient_attn.attention(
            query[sample : sample + 1, heads], k, v, None, None, None, None,
            *window_limits(causal, None), scale, 0.0,
        )  # fmt: skip
        out[sample, heads], lse[sample, heads] = (x[0] for x in exact)
    return out, lse, error


def _asked_for(results, wanted: tuple[bool, bool, bool]):
    chosen = tuple(x for x, is_wanted in zip(results, wanted, strict=True) if is_wanted)
    return chosen[0] if len(chosen) == 1 else chosen


def hyper_plan(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool = False,
    config: HyperConfig = _DEFAULT,
    seed: int = 0,
    head_map: HeadMap | None = None,
) -> HyperPlan:
    """What :func:`hyper_attention` decides before it computes: hashed blocks and samples.

    A plan can be used again, for other values, for the recomputation of a checkpointed layer, or
    for a step in which queries and keys have hardly changed. It holds no gradients.

    Args:
        query: Queries.
        key: Keys.
        causal: As in :func:`hyper_attention`, which has to be given the same.
        config: How keys are chosen.
        seed: Fixes everything random.
        head_map: As in :func:`hyper_attention`.

    Returns:
        The plan, a tuple of tensors and numbers, described at its class.

    Shape:
        - query: ``(B, Hq, Nq, D)``; key: ``(B, Hk, Nk, D)``

    Raises:
        ValueError: A shape or the head map does not fit.
        TypeError: A dtype or a kind does not fit.
    """
    contract.check_tensors(query, key, key, ("batch", "heads", "tokens", "dim"))
    _check_options(config, seed, None)
    if head_map is not None:
        value = key.new_empty(key.shape[0], head_map.num_v_heads, key.shape[2], 1)
        maps = contract.resolve_map(head_map, query, key, value, heads=1, rows=query.shape[0])
    else:
        value = key
        maps = contract.resolve_map(None, query, key, value, heads=1, rows=query.shape[0])
    key, _ = even_heads(query, key, value, *maps)
    return make_plan(query, key, causal=causal, config=config, seed=seed)


def hyper_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = False,
    scale: float | None = None,
    config: HyperConfig = _DEFAULT,
    seed: int = 0,
    head_map: HeadMap | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`hyper_attention` of each sequence to itself, all sequences packed end to end.

    Each sequence has the plan, and the result, that it has alone; long ones are estimated and short
    ones exact. The lengths are read back from an accelerator.

    Args:
        query: Packed queries.
        key: Packed keys.
        value: Packed values.
        cu_seqlens_q: Where each sequence's queries start, and where the last one ends.
        cu_seqlens_k: The same for keys and values.
        causal: As in :func:`hyper_attention`, aligned to each sequence's own lower right corner.
        scale: As in :func:`hyper_attention`.
        config: As in :func:`hyper_attention`.
        seed: As in :func:`hyper_attention`.
        head_map: As in :func:`hyper_attention`; a map may have one row per sequence.
        return_lse: Return the estimated log-sum-exp too.

    Returns:
        ``out``, or ``(out, lse)``.

    Shape:
        - query: ``(T, Hq, D)``; key: ``(S, Hk, D)``; value: ``(S, Hv, Dv)``
        - cu_seqlens_q, cu_seqlens_k: ``(sequences + 1,)``, int32 or int64
        - out: ``(T, Hq, Dv)``; lse: ``(T, Hq)``, natural logarithm

    Raises:
        ValueError: A shape, the packing or the head map does not fit.
        TypeError: A dtype or a kind does not fit.
    """
    contract.check_tensors(query, key, value, ("tokens", "heads", "dim"))
    contract.check_packing("cu_seqlens_q", cu_seqlens_q, query)
    contract.check_packing("cu_seqlens_k", cu_seqlens_k, key)
    _check_options(config, seed, None)
    sequences = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] - 1 != sequences:
        raise ValueError(
            f"cu_seqlens_q names {sequences} sequences and cu_seqlens_k "
            f"{cu_seqlens_k.shape[0] - 1}; they must name the same."
        )
    contract.resolve_map(head_map, query, key, value, heads=1, rows=sequences)
    out, lse = each_sequence(
        hyper_attention, query, key, value, cu_seqlens_q, cu_seqlens_k, head_map,
        causal=causal, scale=scale, config=config, seed=seed,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_options(config: HyperConfig, seed: int, plan: HyperPlan | None) -> None:
    if not isinstance(config, HyperConfig):
        raise TypeError(f"config is a {type(config).__name__}; pass an efficient_attn.HyperConfig.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; pass an integer.")
    if plan is not None and not isinstance(plan, HyperPlan):
        raise TypeError(f"plan is a {type(plan).__name__}; pass what hyper_plan returned.")


def _check_plan(plan: HyperPlan, query: Tensor, key: Tensor, causal: bool) -> None:
    """A plan is for one shape, one mask and one device."""
    batch, heads, _, nk = plan.key_order.shape
    rows = plan.band_start.shape[-1]
    found = (key.shape[0], key.shape[1], query.shape[1] // key.shape[1] * query.shape[2])
    if (batch, heads, rows) != found or nk != key.shape[2]:
        raise ValueError(
            f"plan is for {batch} samples, {heads} key heads, {rows} queries of each and {nk} "
            f"keys, but there are {found[0]}, {found[1]}, {found[2]} and {key.shape[2]}."
        )
    if plan.causal != causal:
        raise ValueError(f"plan was made for causal={plan.causal}, but causal is {causal}.")
    if plan.key_order.device != query.device:
        raise ValueError(
            f"plan is on {plan.key_order.device} and query on {query.device}; plan on that device."
        )
