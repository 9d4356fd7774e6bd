"""What a provider is, and what several of them refuse alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

from bench.workloads import Inputs, Workload

Call = Callable[[], Tensor]
# "ours" is compared with the fastest "torch"; a "yardstick" is shown and never compared with.
Side = Literal["ours", "torch", "yardstick"]

GIB = 2**30
MAX_SCORE_BYTES = {"cpu": GIB // 4, "cuda": 4 * GIB}


class Provider(Protocol):
    """One way to compute attention."""

    name: str
    side: Side

    def available(self, device: str) -> list[str]:
        """Why it cannot run on this kind of device; empty if it can."""
        ...

    def supports(self, workload: Workload) -> list[str]:
        """Why it cannot run this workload; empty if it can."""
        ...

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        """Prepare what is prepared once, and return the call, which gives the output."""
        ...


def too_many_scores(workload: Workload, share: float = 1.0) -> list[str]:
    """A reason against a provider that writes the scores of all heads.

    Args:
        workload: What it would run.
        share: Of the most that is tolerated.
    """
    if workload.score_bytes() <= share * MAX_SCORE_BYTES[workload.device]:
        return []
    return [f"it would write {workload.score_bytes() / GIB:.1f} GiB of scores"]
