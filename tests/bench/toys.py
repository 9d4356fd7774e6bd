"""Workloads and providers small enough for tests."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from bench.providers import PROVIDERS
from bench.workloads import Workload

GQA = Workload(
    name="toy-gqa-33",
    suite="toy",
    device="cpu",
    batch=2,
    q_heads=4,
    k_heads=2,
    v_heads=2,
    num_queries=33,
    num_keys=33,
    d_qk=8,
    d_v=8,
)
BOTH = replace(GQA, name="toy-gqa-both-33", mode="forward_backward")
MHA = replace(GQA, name="toy-mha-33", k_heads=4, v_heads=4)
UNEVEN = replace(BOTH, name="toy-uneven-33", q_to_k=(0, 1, 1, 1), q_to_v=(0, 1, 1, 1))
PERMUTED = replace(BOTH, name="toy-permuted-33", q_to_k=(1, 0, 1, 0), q_to_v=(0, 1, 1, 0))
DIFF = replace(BOTH, name="toy-diff-33", k_heads=1, v_heads=2, d_qk=4)
WINDOW = replace(BOTH, name="toy-window-33", window=(5, 0))
RECTANGLE = replace(BOTH, name="toy-rectangle-33", num_queries=9)
FULL = replace(BOTH, name="toy-full-33", causal=False)
HALF = replace(BOTH, name="toy-half-33", dtype="bfloat16", layout="heads")
ALL = (GQA, BOTH, MHA, UNEVEN, PERMUTED, DIFF, WINDOW, RECTANGLE, FULL, HALF)

CACHE = replace(GQA, name="toy-cache-33", op="decode", num_queries=1, layout="heads")
SEVERAL = replace(CACHE, name="toy-several-33", num_queries=3)
OWN_HEADS = replace(CACHE, name="toy-own-33", k_heads=4, v_heads=4)
UNEQUAL = replace(SEVERAL, name="toy-unequal-33", q_heads=8, k_heads=2, v_heads=4)
MORE_KEYS = replace(UNEQUAL, name="toy-more-keys-33", k_heads=4, v_heads=2)
# Key and value head 1 are read by nobody.
EMPTY_GROUP = replace(
    SEVERAL,
    name="toy-empty-33",
    k_heads=3,
    v_heads=3,
    q_to_k=(0, 2, 2, 2),
    q_to_v=(0, 2, 2, 2),
)
LATENT = replace(CACHE, name="toy-latent-33", op="mla_decode", k_heads=1, v_heads=1, d_qk=12, d_v=8)
HALF_CACHE = replace(CACHE, name="toy-half-cache-33", dtype="bfloat16")
CACHED = (CACHE, SEVERAL, OWN_HEADS, UNEQUAL, MORE_KEYS, EMPTY_GROUP, LATENT, HALF_CACHE)


@dataclass(frozen=True)
class Stand:
    """A provider that does what the one named ``inner`` does, and then one thing wrong."""

    name: str
    side: str = "torch"
    fault: str = ""
    inner: str = "eager"

    def available(self, device):
        return []

    def supports(self, workload):
        return []

    def build(self, workload, inputs):
        call = PROVIDERS[self.inner].build(workload, inputs)

        def faulty():
            if self.fault == "crash":
                os._exit(1)
            if self.fault == "raise":
                raise RuntimeError("no kernel at /opt/secret/place/kernel.cu for this")
            if self.fault == "bug":
                raise KeyError("a mistake")
            out = call()
            if self.fault == "last row":
                out = torch.cat([out[:, :, :-1], out[:, :, -2:-1]], 2)
            if self.fault == "nan":
                out = out * torch.where(torch.arange(out.shape[2]) == 0, torch.nan, 1.0)[:, None]
            if self.fault == "shape":
                out = out.transpose(1, 2)
            if self.fault == "half gradient":
                out = 0.5 * out + 0.5 * out.detach()
            return out

        return faulty
