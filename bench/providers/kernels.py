"""Each of the kernels that the package has to attend to a cache, whichever of them answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bench.providers.protocol import Call, Side
from bench.workloads import Inputs, Workload
from efficient_attn.testing import implementation

OPS = {"decode": "attention_decode", "mla_decode": "mla_decode"}


@dataclass(frozen=True)
class CacheKernel:
    """A kernel that attends to a cache, called without asking whether it is the one to call."""

    kernel: Literal["cuda", "triton"]
    side: Side = "yardstick"

    @property
    def name(self) -> str:
        return f"efficient_attn-{self.kernel}"

    def available(self, device: str) -> list[str]:
        if device != "cuda":
            return ["it runs on CUDA devices"]
        try:
            self._op("attention_decode", device)
        except RuntimeError as error:
            return [str(error)]
        return []

    def supports(self, workload: Workload) -> list[str]:
        if workload.op not in OPS or workload.top_values is not None:
            return ["it attends to all that is in a cache"]
        if self.kernel == "cuda" and (workload.window is not None or workload.dtype == "float32"):
            return ["it has no window, and computes in bfloat16 and float16"]
        return []

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        device = inputs.query.device
        lengths = torch.full((workload.batch,), workload.num_keys, dtype=torch.int32, device=device)
        op = self._op(OPS[workload.op], device.type)
        if workload.is_latent:
            queries = inputs.query.split([workload.d_v, workload.d_qk - workload.d_v], -1)
            cache = inputs.key.squeeze(1)
            return lambda: op(*queries, cache, lengths, None, workload.scale)[0]
        head_map = workload.head_map(device.type)
        maps = (None, None) if head_map is None else (head_map.q_to_k, head_map.q_to_v)
        window = None if workload.window is None else workload.window[0]
        return lambda: op(*inputs, lengths, None, *maps, window, workload.scale, 0.0)[0]

    def _op(self, name: str, device: str):
        return implementation(name, device, is_native=self.kernel == "cuda")
