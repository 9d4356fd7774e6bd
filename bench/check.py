"""The gate: nothing is timed before its values have been compared with fp64.

The call is judged at its full size, in a sample of query rows. Where gradients are asked for, the
gradient that enters is zero in every other row, so that the exact dQ, dK and dV depend on the
sampled rows alone and cost little at any length.

Every error is measured in units of the root of the sum of squares of the terms that were added to
form the value. In those units rounding looks alike everywhere, so a wrong row late in a causal
sequence, whose values are small, is as visible as a wrong row early in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import efficient_attn as ea
from bench.estimate import Estimate, estimate_of
from bench.workloads import Inputs, Workload

# An implementation may be this many times less accurate than the plain formula in its dtype ...
FACTOR = 2.0
# ... plus this many units in the last place, for values that the plain formula gets exactly.
FLOOR = 4.0
# The same for an estimate, whose parts are merged by exponentials of differences of logarithms.
MERGED_FLOOR = 16.0

EDGE_ROWS = 4
SAMPLED_ROWS = 128
MAX_SCORES = 2**24


@dataclass(frozen=True)
class Truth:
    """What the sampled rows of one workload must give.

    Attributes:
        rows: The sampled query rows, ascending.
        grad_out: The gradient to send back, zero outside the rows; ``None`` in forward mode.
        exact: fp64 values of ``out`` (sampled rows) and, with gradients, ``dq`` (sampled rows),
            ``dk`` and ``dv`` (complete).
        magnitude: Of each, the size in which errors are measured.
        limit: Of each, the largest error accepted.
    """

    rows: Tensor
    grad_out: Tensor | None
    exact: dict[str, Tensor]
    magnitude: dict[str, Tensor]
    limit: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """The errors found, what was allowed, and every reason to refuse."""

    errors: dict[str, float]
    limits: dict[str, float]
    reasons: list[str]

    @property
    def passed(self) -> bool:
        return not self.reasons


def prepare(
    workload: Workload,
    inputs: Inputs,
    seed: int = 1,
    plan: ea.HyperPlan | None = None,
    top_values: int | None = None,
) -> Truth:
    """Compute the truth in fp64, and what the plain formula makes of it in the workload's dtype.

    With a plan, the truth is the estimate that the plan stands for: what is judged is whether it is
    computed right, not how near it is to exact attention. With ``top_values``, it is what so many
    values of the largest weights give.
    """
    device = inputs.query.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = _sample_rows(workload, generator)
    grad_out = None
    if workload.needs_gradients:
        grad_out = torch.zeros_like(workload.make_grad_out(generator))
        grad_out[:, :, rows] = workload.make_grad_out(generator)[:, :, rows]
    exact, magnitude = _evaluate(workload, inputs, rows, grad_out, torch.float64, plan, top_values)
    plain, _ = _evaluate(workload, inputs, rows, grad_out, workload.torch_dtype, plan, top_values)
    floor = (FLOOR if plan is None else MERGED_FLOOR) * torch.finfo(workload.torch_dtype).eps
    limit = {
        name: FACTOR * largest_error(plain[name], exact[name], magnitude[name]) + floor
        for name in exact
    }
    return Truth(rows, grad_out, exact, magnitude, limit)


def judge(workload: Workload, truth: Truth, results: tuple[Tensor, ...]) -> Verdict:
    """Compare what a provider returned: ``(out,)`` or ``(out, dq, dk, dv)``."""
    errors: dict[str, float] = {}
    reasons = []
    for name, result in zip(truth.exact, results, strict=True):
        if misshapen := _misshapen(workload, name, result):
            reasons.append(misshapen)
            continue
        part = result[:, :, truth.rows] if name in ("out", "dq") else result
        errors[name] = largest_error(part.detach(), truth.exact[name], truth.magnitude[name])
        # Written so that NaN fails.
        if not errors[name] <= truth.limit[name]:
            reasons.append(
                f"{name} is off by {errors[name]:.2e}, allowed are {truth.limit[name]:.2e}"
            )
    return Verdict(errors, truth.limit, reasons)


def judge_plausibility(workload: Workload, truth: Truth, results: tuple[Tensor, ...]) -> Verdict:
    """What can be asked of an estimate whose plan is not known: the right shape, and no NaN."""
    reasons = []
    for name, result in zip(truth.exact, results, strict=True):
        if misshapen := _misshapen(workload, name, result):
            reasons.append(misshapen)
        elif not bool(result.isfinite().all()):
            reasons.append(f"{name} is not finite everywhere")
    return Verdict({}, {}, reasons)


def _misshapen(workload: Workload, name: str, result: Tensor) -> str:
    """What is wrong with the shape or the dtype of a result; empty if nothing is."""
    expected = {
        "out": (workload.batch, workload.q_heads, workload.num_queries, workload.d_v),
        "dq": (workload.batch, workload.q_heads, workload.num_queries, workload.d_qk),
        "dk": (workload.batch, workload.k_heads, workload.num_keys, workload.d_qk),
        "dv": (workload.batch, workload.v_heads, workload.num_keys, workload.d_v),
    }[name]
    if tuple(result.shape) == expected and result.dtype == workload.torch_dtype:
        return ""
    return (
        f"{name} is {tuple(result.shape)} {result.dtype}, expected {expected} "
        f"{workload.torch_dtype}"
    )


def largest_error(value: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """The largest difference, in units of ``magnitude``; NaN if any value is."""
    return float(((value.double() - exact).abs() / magnitude).max())


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor | None,
    visible: Tensor,
    scale: float,
    estimate: Estimate | None = None,
    top_values: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Softmax attention of one head and its gradients, as written in a textbook.

    Shape:
        - query: ``(batch, rows, d_qk)``
        - key: ``(batch, keys, d_qk)``; value: ``(batch, keys, d_v)``
        - grad_out: ``(batch, rows, d_v)`` or ``None``; visible: ``(rows, keys)``
        - estimate: of how many keys each stands for, ``(rows, keys)``
        - top_values: how many weights count, the largest ones; a number

    Returns:
        The results by name, and the sum of squares of the terms of each.
    """
    scores = query @ key.mT * scale
    if estimate is not None:
        scores, limited = estimate.weighted(scores)
    scores = scores.masked_fill(~visible, -torch.inf)
    # A row that sees nothing has no softmax; it gives zeros.
    weights = scores.softmax(-1).masked_fill(~visible, 0)
    if top_values is not None:
        # Which they are does not depend on the precision of the rest.
        exact = (query.double() @ key.double().mT * scale).masked_fill(~visible, -torch.inf)
        last = exact.topk(min(top_values, exact.shape[-1])).values[..., -1:]
        weights = weights.masked_fill(exact < last, 0)
    results = {"out": weights @ value}
    squares = {"out": weights**2 @ value**2}
    if grad_out is not None:
        grad_weights = grad_out @ value.mT
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        if estimate is not None:
            mean = estimate.mean(limited, weights, grad_weights)
        grad_scores = weights * (grad_weights - mean) * scale
        results["dq"] = grad_scores @ key
        results["dk"] = grad_scores.mT @ query
        results["dv"] = weights.mT @ grad_out
        size = grad_out**2 @ (value**2).mT
        size = (weights * scale) ** 2 * (size + (weights**2 * size).sum(-1, keepdim=True))
        squares["dq"] = size @ key**2
        squares["dk"] = size.mT @ query**2
        squares["dv"] = (weights**2).mT @ grad_out**2
    return results, squares


def _evaluate(
    workload: Workload,
    inputs: Inputs,
    rows: Tensor,
    grad_out: Tensor | None,
    dtype: torch.dtype,
    plan: ea.HyperPlan | None = None,
    top_values: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The formula for a few heads at a time, so that memory stays small; sums are kept in fp64."""
    query, key, value = (x.detach() for x in inputs)
    visible = workload.visible_keys(rows)
    per_head: dict[str, list[Tensor]] = {"out": [], "dq": []}
    head_squares: dict[str, list[Tensor]] = {"out": [], "dq": []}
    sums: dict[str, Tensor] = {}
    sum_squares: dict[str, Tensor] = {}
    if grad_out is not None:
        for name, like in (("dk", key), ("dv", value)):
            sums[name] = torch.zeros_like(like, dtype=torch.float64)
            sum_squares[name] = torch.zeros_like(like, dtype=torch.float64)
    # One head alone where rounding counts: a product of many rows is added up more exactly.
    most = max(1, MAX_SCORES // (len(rows) * workload.num_keys)) if dtype == torch.float64 else 1
    for heads, k, v in _heads_at_a_time(workload, most):
        count = heads.stop - heads.start
        results, squares = formula(
            query[:, heads, rows].flatten(1, 2).to(dtype),
            key[:, k].to(dtype),
            value[:, v].to(dtype),
            None if grad_out is None else grad_out[:, heads, rows].flatten(1, 2).to(dtype),
            visible.repeat(count, 1),
            workload.scale,
            None if plan is None else estimate_of(workload, plan, heads, rows),
            top_values,
        )
        for name, read in (("dk", k), ("dv", v)):
            if name in results:
                sums[name][:, read] += results[name]
                sum_squares[name][:, read] += squares[name]
        for name in ("out", "dq"):
            if name in results:
                per_head[name].append(results[name].unflatten(1, (count, -1)))
                head_squares[name].append(squares[name].unflatten(1, (count, -1)))
    gathered = {name: torch.cat(parts, 1) for name, parts in per_head.items() if parts}
    spread = {name: torch.cat(parts, 1) for name, parts in head_squares.items() if parts}
    # A value to which nothing was added must be zero: any error there is infinite in its units.
    tiny = torch.finfo(torch.float64).tiny
    magnitude = {
        name: squares.double().sqrt().clamp(min=tiny)
        for name, squares in {**spread, **sum_squares}.items()
    }
    return {**gathered, **sums}, magnitude


def _heads_at_a_time(workload: Workload, most: int) -> Iterator[tuple[slice, int, int]]:
    """Runs of at most so many query heads that read the same key and value head, and those two."""
    pairs = list(zip(workload.key_index(), workload.value_index(), strict=True))
    start = 0
    for head in range(1, len(pairs) + 1):
        if head == len(pairs) or pairs[head] != pairs[start] or head - start == most:
            yield slice(start, head), *pairs[start]
            start = head


def _sample_rows(workload: Workload, generator: torch.Generator) -> Tensor:
    """The first and last few rows, and random ones between them."""
    total = workload.num_queries
    wanted = min(SAMPLED_ROWS, total, max(2 * EDGE_ROWS, MAX_SCORES // workload.num_keys))
    drawn = torch.randperm(total, generator=generator, device=generator.device)[:wanted]
    edges = torch.arange(min(EDGE_ROWS, total), device=generator.device)
    return torch.cat([edges, total - 1 - edges, drawn]).unique()
