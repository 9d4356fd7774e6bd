"""One workload from inputs to records: check, then time, then weigh."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from bench.check import Truth, Verdict, judge, judge_plausibility, prepare
from bench.environment import without_paths
from bench.estimate import plan_of
from bench.measure import Clock, Timing, interleave, peak_bytes
from bench.providers import Call, Provider, reasons_against
from bench.workloads import Inputs, Workload

Write = Callable[[dict], None]
Step = Callable[[], tuple[Tensor, ...]]

# Several times what a processor caches: as much as one call reads is never there when it begins.
COLD_BYTES = 2**28
MAX_COPIES = 256


@dataclass
class Outcome:
    """What became of one provider on one workload.

    ``status`` is ``"timed"``, ``"refused"`` (it raised, as torch does for what a backend cannot
    run), ``"wrong"`` (it failed the check) or ``"broken"`` (it raised where it should not have).
    """

    provider: Provider
    status: str
    reasons: list[str] = field(default_factory=list)
    step: Step | None = None
    verdict: Verdict | None = None


def run_workload(
    workload: Workload,
    providers: list[Provider],
    device: str,
    clock: Clock,
    write: Write,
    *,
    seconds: float = 2.0,
    trying: Callable[[str], None] = lambda provider: None,
) -> None:
    """Check and time every provider that can run ``workload``, and write one record for each.

    Providers that declare a reason against the workload are left out; ``reasons_against`` has them.

    Args:
        workload: What to run.
        providers: Whom to time.
        device: ``"cpu"`` or ``"cuda"``.
        clock: The device's clock.
        write: Receives the records.
        seconds: Time to spend on each provider.
        trying: Told the name of each provider before it is set to work.
    """
    for record in _measure(workload, providers, device, clock, seconds, trying):
        write(record)
    # Only now nothing refers to the tensors of this workload any more.
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _measure(
    workload: Workload,
    providers: list[Provider],
    device: str,
    clock: Clock,
    seconds: float,
    trying: Callable[[str], None],
) -> list[dict]:
    inputs = workload.make_inputs(device)
    truth = estimated = prepare(workload, inputs)
    if workload.op == "hyper":
        estimated = prepare(workload, inputs, plan=plan_of(workload, inputs))
    if workload.top_values is not None:
        estimated = prepare(workload, inputs, top_values=workload.top_values)
    copies = [inputs, *(copy.deepcopy(inputs) for _ in range(copies_wanted(workload, device) - 1))]
    # Checked with a gradient that is mostly zeros, timed with one that has none.
    grad_out = None
    if workload.needs_gradients:
        grad_out = workload.make_grad_out(torch.Generator(device).manual_seed(2))
    outcomes = []
    for provider in providers:
        if not reasons_against(provider, workload, device):
            trying(provider.name)
            expected = estimated if provider.side == "ours" else truth
            outcomes.append(_admit(provider, workload, copies, expected, grad_out, device))
    steps = {o.provider.name: o.step for o in outcomes if o.step is not None}
    others = [o.provider.name for o in outcomes if o.provider.side in ("ceiling", "estimate")]
    timings = interleave(steps, clock, seconds, trying, others)
    records = []
    for outcome in outcomes:
        trying(outcome.provider.name)
        records.append(_record(workload, outcome, timings, device))
    return records


def _record(
    workload: Workload,
    outcome: Outcome,
    timings: dict[str, Timing],
    device: str,
) -> dict:
    record = {
        "kind": "result",
        "workload": workload.as_record(),
        "provider": outcome.provider.name,
        "side": outcome.provider.side,
        "status": outcome.status,
        "reasons": outcome.reasons,
    }
    if outcome.verdict is not None:
        record["errors"] = outcome.verdict.errors
        record["error_limits"] = outcome.verdict.limits
    if outcome.step is not None:
        timing = timings[outcome.provider.name]
        record["seconds"] = asdict(timing)
        record["flops_per_second"] = workload.flops() / timing.median
        record["bytes_per_second"] = workload.minimal_bytes() / timing.median
        record["memory"] = _weigh(workload, outcome.step, device)
    return record


def _admit(
    provider: Provider,
    workload: Workload,
    copies: list[Inputs],
    truth: Truth,
    grad_out: Tensor | None,
    device: str,
) -> Outcome:
    """Build and check one provider; only what passes carries a step.

    It is checked on the first copy of the inputs, and timed on all of them in turn.
    """
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            calls = [provider.build(workload, inputs) for inputs in copies]
            verdict = None
            if provider.side != "ceiling":
                results = make_step(calls[0], copies[0], truth.grad_out)()
                judged = judge_plausibility if provider.side == "estimate" else judge
                verdict = judged(workload, truth, results)
            if workload.replayed and device == "cuda":
                calls = [captured(call) for call in calls]
        # Whatever a provider raises is its own result and must not end the run.
        except Exception as error:
            if device == "cuda":
                # Raises again where the context is lost, and then the process has to be replaced.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            said = [_first_line(str(w.message)) for w in heard]
            reasons = [f"{type(error).__name__}: {_first_line(str(error))}", *dict.fromkeys(said)]
            foreign = provider.side == "estimate"
            refused = foreign or provider.side != "ours" and isinstance(error, RuntimeError)
            return Outcome(provider, "refused" if refused else "broken", reasons)
    if verdict is not None and not verdict.passed:
        return Outcome(provider, "wrong", verdict.reasons, verdict=verdict)
    steps = itertools.cycle(
        [make_step(call, inputs, grad_out) for call, inputs in zip(calls, copies, strict=True)]
    )
    return Outcome(provider, "timed", step=lambda: next(steps)(), verdict=verdict)


def copies_wanted(workload: Workload, device: str) -> int:
    """How many copies of its inputs a workload is timed on, so that a CPU finds no cache warm.

    In a model, the weights of all layers have gone through the processor between two calls. On
    CUDA the clock sees to it.
    """
    if device == "cuda" or not workload.reads_a_cache:
        return 1
    return max(1, min(MAX_COPIES, COLD_BYTES // workload.cache_bytes()))


def captured(call: Call) -> Call:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def make_step(call: Call, inputs: Inputs, grad_out: Tensor | None) -> Step:
    """What is timed: the call alone, or the call and the gradients of all three inputs."""
    if grad_out is None:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (call(),)

        return forward

    def forward_backward() -> tuple[Tensor, ...]:
        out = call()
        return (out, *torch.autograd.grad(out, inputs, grad_out))

    return forward_backward


def _weigh(workload: Workload, step: Step, device: str) -> dict:
    """Peak memory of one call, and what of it is neither output nor gradient.

    ``workspace_in_expanded_keys`` below 1 proves that K was never written out per query head.
    """
    peak = peak_bytes(step, device)
    results = workload.result_bytes()
    expanded = workload.expanded_key_bytes()
    return {
        "peak_bytes": peak,
        "result_bytes": results,
        "expanded_key_bytes": expanded,
        "workspace_in_expanded_keys": max(0, peak - results) / expanded,
    }


def _first_line(message: str) -> str:
    line = message.partition("(Triggered internally")[0].strip().partition("\n")[0]
    return without_paths(line)[:300]
