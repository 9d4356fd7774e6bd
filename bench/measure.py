"""How time and memory are taken."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]

FLUSH_BYTES = 256 * 2**20
MIN_ROUNDS, MAX_ROUNDS = 5, 50
MAX_REPEATS = 200
# A step this many times slower than the fastest sits out after SLOW_ROUNDS.
SLOW, SLOW_ROUNDS = 2.0, 3
# One that takes so many seconds besides is timed once: it is far from the fastest, whatever noise.
LONG = 10.0


class Clock(Protocol):
    """Times repeated calls of one step on one kind of device."""

    round_seconds: float

    def sample(self, step: Step, repeats: int) -> float:
        """Seconds per call, over ``repeats`` calls."""
        ...


class CpuClock:
    """Wall time; the mean over the repeats of a round."""

    round_seconds = 0.1

    def sample(self, step: Step, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats


class CudaClock:
    """CUDA events around each call, the L2 cache flushed before it; the median of a round.

    The time includes launching where a step launches more slowly than it computes, as users see it.
    """

    round_seconds = 0.02

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def sample(self, step: Step, repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            step()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return median(start.elapsed_time(end) for start, end in pairs) / 1e3


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and 20/80 quantiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int
    repeats: int


def clock_for(device: str) -> Clock:
    """The clock of a kind of device."""
    return CudaClock() if device == "cuda" else CpuClock()


def interleave(
    steps: dict[str, Step],
    clock: Clock,
    seconds: float,
    trying: Callable[[str], None] = lambda name: None,
    apart: Collection[str] = (),
) -> dict[str, Timing]:
    """Time steps in rounds A-B-C, C-B-A, ... so that drift of the machine meets all alike.

    The steps must have run before. Each round calls every step often enough to fill the clock's
    ``round_seconds``, or its share of ``seconds`` if that is less.

    Args:
        steps: What to time, by name.
        clock: The device's clock.
        seconds: Time to spend per step, between ``MIN_ROUNDS`` and ``MAX_ROUNDS`` rounds.
        trying: Told the name of each step before it is called.
        apart: Steps that do less than the others, or other things, and so do not make them slow.
    """
    if not steps:
        return {}
    estimates = {}
    for name, step in steps.items():
        trying(name)
        estimates[name] = clock.sample(step, 1)
    compared = [estimate for name, estimate in estimates.items() if name not in apart]
    fastest = min(compared or estimates.values())
    fill = min(clock.round_seconds, seconds / MIN_ROUNDS)
    repeats = {
        name: max(1, min(MAX_REPEATS, round(fill / max(estimate, 1e-7))))
        for name, estimate in estimates.items()
    }
    round_cost = sum(repeats[name] * min(estimates[name], SLOW * fastest) for name in steps)
    rounds = round(seconds * len(steps) / round_cost) if round_cost > 0 else MAX_ROUNDS
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, rounds))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            slow = estimates[name] > SLOW * fastest
            if slow and estimates[name] > LONG:
                samples[name] = [estimates[name]]
            elif number < SLOW_ROUNDS or not slow:
                trying(name)
                samples[name].append(clock.sample(steps[name], repeats[name]))
    return {name: _summarise(samples[name], repeats[name]) for name in steps}


def peak_bytes(step: Step, device: str) -> int:
    """The most memory that one call of ``step`` holds at once, beyond what was held before it."""
    return _peak_bytes_cuda(step) if device == "cuda" else _peak_bytes_cpu(step)


def _peak_bytes_cuda(step: Step) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def _peak_bytes_cpu(step: Step) -> int:
    """Add up what the profiler reports; its own total goes on from one profile to the next."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    held: dict[int, int] = {}
    total = peak = 0
    for event in memory:
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            held[address] = size
            total += size
        else:
            # Blocks that were there before the call give nothing when they go.
            total -= held.pop(address, 0)
        peak = max(peak, total)
    return peak


def _summarise(samples: list[float], repeats: int) -> Timing:
    fifths = quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
    return Timing(median(samples), fifths[0], fifths[3], len(samples), repeats)
