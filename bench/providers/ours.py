"""The package's public functions."""

from __future__ import annotations

from dataclasses import dataclass

import efficient_attn as ea
from bench.providers.protocol import Call, Side
from bench.workloads import Inputs, Workload


@dataclass(frozen=True)
class Ours:
    """``efficient_attn.attention``, as exported."""

    name: str = "efficient_attn"
    side: Side = "ours"

    def available(self, device: str) -> list[str]:
        return [] if hasattr(ea, "attention") else ["this version has no attention()"]

    def supports(self, workload: Workload) -> list[str]:
        return []

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        head_map = workload.head_map(inputs.query.device.type)
        return lambda: ea.attention(
            *inputs, head_map=head_map, causal=workload.causal, window=workload.window
        )
