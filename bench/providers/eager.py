"""The formula, as a yardstick."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.providers.protocol import Call, Side, too_many_scores
from bench.workloads import Inputs, Workload


@dataclass(frozen=True)
class Eager:
    """Softmax attention as in a textbook, one operation after another."""

    name: str = "eager"
    side: Side = "yardstick"

    def available(self, device: str) -> list[str]:
        return []

    def supports(self, workload: Workload) -> list[str]:
        if workload.reads_a_cache:
            return ["bmm-packed is the same without copies of the heads"]
        # The slowest of all, and compared with nothing: at the shortest lengths it says enough.
        return too_many_scores(workload, share=0.25)

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        device = inputs.query.device
        key_index = torch.tensor(workload.key_index(), device=device)
        value_index = torch.tensor(workload.value_index(), device=device)
        visible = workload.visible_keys(torch.arange(workload.num_queries, device=device))

        def call() -> Tensor:
            query, key, value = inputs
            scores = query @ key[:, key_index].mT * workload.scale
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            return weights @ value[:, value_index]

        return call
