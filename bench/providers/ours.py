"""The package's public functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import efficient_attn as ea
from bench.providers.protocol import Call, Side
from bench.workloads import Inputs, Workload

FUNCTIONS = {"attention": "attention", "decode": "attention_decode", "mla_decode": "mla_decode"}


@dataclass(frozen=True)
class Ours:
    """What ``efficient_attn`` exports for the workload's op."""

    name: str = "efficient_attn"
    side: Side = "ours"

    def available(self, device: str) -> list[str]:
        return []

    def supports(self, workload: Workload) -> list[str]:
        name = FUNCTIONS[workload.op]
        return [] if hasattr(ea, name) else [f"this version has no {name}()"]

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        device = inputs.query.device
        head_map = workload.head_map(device.type)
        if workload.op == "attention":
            return lambda: ea.attention(
                *inputs, head_map=head_map, causal=workload.causal, window=workload.window
            )
        lengths = torch.full((workload.batch,), workload.num_keys, dtype=torch.int32, device=device)
        if workload.op == "decode":
            return lambda: ea.attention_decode(
                *inputs, cache_lengths=lengths, head_map=head_map, window=workload.window
            )
        # Parts of one tensor: joining them is not what is timed.
        q_latent, q_rope = inputs.query.split([workload.d_v, workload.d_qk - workload.d_v], -1)
        cache = inputs.key.squeeze(1)
        return lambda: ea.mla_decode(
            q_latent, q_rope, cache, cache_lengths=lengths, scale=workload.scale
        )
