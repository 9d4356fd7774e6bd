"""The ceiling of whatever reads a cache: reading as many bytes, and doing nothing with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.providers.protocol import Call, Side
from bench.workloads import Inputs, Workload


@dataclass(frozen=True)
class Read:
    """torch adds up as many bytes of fp32 as the workload must read, in the same rounds.

    Of what torch offers, a sum reads fastest; see ``bench.ceilings``.
    """

    name: str = "read"
    side: Side = "ceiling"

    def available(self, device: str) -> list[str]:
        return ["the ceiling there is the bandwidth of copying"] if device == "cuda" else []

    def supports(self, workload: Workload) -> list[str]:
        return [] if workload.reads_a_cache else ["arithmetic bounds it, not reading"]

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        memory = torch.ones(workload.cache_bytes() // 4, device=inputs.query.device)
        return memory.sum
