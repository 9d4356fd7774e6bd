"""What a provider is, and what several of them refuse alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch.nn.functional as F
from torch import Tensor

from bench.workloads import Inputs, Workload

Call = Callable[[], Tensor]
# "ours" is compared with the fastest "torch"; a "yardstick" is shown and never compared with. A
# "ceiling" computes something else, which takes the least time that the call could take. An
# "estimate" follows a plan of its own, so that only its plausibility can be judged.
Side = Literal["ours", "torch", "yardstick", "ceiling", "estimate"]

GIB = 2**30
MAX_SCORE_BYTES = {"cpu": GIB // 4, "cuda": 4 * GIB}
MAX_COPIED_BYTES = {"cpu": GIB // 2, "cuda": 16 * GIB}


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


def too_many_copies(workload: Workload) -> list[str]:
    """A reason against a provider that copies cached heads to every query head that reads them."""
    copied = workload.copied_bytes()
    if not workload.reads_a_cache or copied <= MAX_COPIED_BYTES[workload.device]:
        return []
    return [f"it would copy keys and values to {copied / GIB:.1f} GiB"]


def equally_wide(
    workload: Workload, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad with zeros to one width. A latent row as a whole stands in for its value: no copy."""
    if workload.is_latent:
        return query, key, key
    width = max(workload.d_qk, workload.d_v)
    query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    return query, key, value
