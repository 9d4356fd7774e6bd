"""The package's public functions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import efficient_attn as ea
from bench.providers.protocol import Call, Side
from bench.workloads import HYPER_CONFIGS, Inputs, Workload

FUNCTIONS = {
    "attention": "attention",
    "decode": "attention_decode",
    "mla_decode": "mla_decode",
    "hyper": "hyper_attention",
}


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
        if workload.op == "hyper":
            config = HYPER_CONFIGS[workload.hyper]
            return lambda: ea.hyper_attention(*inputs, causal=workload.causal, config=config)
        lengths = torch.full((workload.batch,), workload.num_keys, dtype=torch.int32, device=device)
        if workload.op == "decode":
            options = {"cache_lengths": lengths, "head_map": head_map, "window": workload.window}
            return lambda: ea.attention_decode(*inputs, **options, top_values=workload.top_values)
        # Parts of one tensor: joining them is not what is timed.
        q_latent, q_rope = inputs.query.split([workload.d_v, workload.d_qk - workload.d_v], -1)
        cache = inputs.key.squeeze(1)
        return lambda: ea.mla_decode(
            q_latent, q_rope, cache, cache_lengths=lengths, scale=workload.scale
        )


@dataclass(frozen=True)
class OursExact:
    """The exact function of the package beside its estimate or selection, for information."""

    name: str = "efficient_attn-exact"
    side: Side = "yardstick"

    def available(self, device: str) -> list[str]:
        return []

    def supports(self, workload: Workload) -> list[str]:
        if workload.top_values is not None:
            return []
        if workload.op != "hyper":
            return ["the call is exact"]
        # It takes as long as torch's; one of the two is enough where both take minutes.
        return [] if workload.num_keys <= 2**15 else ["it would take minutes"]

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        if workload.reads_a_cache:
            return Ours().build(replace(workload, top_values=None), inputs)
        return lambda: ea.attention(*inputs, causal=workload.causal)
