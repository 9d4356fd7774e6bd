"""torch's FlexAttention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.providers.protocol import Call, Side
from bench.workloads import Inputs, Workload


@dataclass(frozen=True)
class Flex:
    """FlexAttention, compiled for the workload's shape; its block mask is built beforehand."""

    name: str = "flex"
    side: Side = "torch"

    def available(self, device: str) -> list[str]:
        if device == "cpu":
            return ["compiling it for a CPU takes longer than the whole run, and has no backward"]
        return []

    def supports(self, workload: Workload) -> list[str]:
        reasons = []
        if not workload.has_even_groups or workload.k_heads != workload.v_heads:
            reasons.append("it takes even contiguous groups of shared key/value heads only")
        if workload.rank > 0:
            reasons.append("compiled for headline workloads only, each costs many seconds")
        return reasons

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        left, right = workload.reach()
        offset = workload.num_keys - workload.num_queries

        def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return (column >= row + offset - left) & (column <= row + offset + right)

        lengths = (workload.num_queries, workload.num_keys)
        everything = workload.visible_scores() == lengths[0] * lengths[1]
        block_mask = None
        if not everything:
            block_mask = create_block_mask(visible, None, None, *lengths, inputs.query.device)
        # Without this, the second shape would be compiled for any shape and be slower.
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(
            *inputs,
            block_mask=block_mask,
            scale=workload.scale,
            enable_gqa=workload.q_heads != workload.k_heads,
        )
