"""What the plan of an estimate costs, with the native kernels and without them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import efficient_attn as ea
from bench.environment import answering
from bench.measure import Clock
from bench.workloads import HYPER_CONFIGS
from efficient_attn.testing import without_native_kernels

# Heads, tokens and width of queries and keys.
SHAPES = {"cpu": (2, 2048, 64), "cuda": (32, 32768, 128)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUNDS, CALLS = 5, 4


def measure_planning(device: str, clock: Clock) -> Iterator[dict]:
    """A record for each configuration, with and without a causal mask; best of alternate rounds.

    It names who hashed and who sorted, which on CUDA is known only after a first call.
    """
    heads, tokens, dim = SHAPES[device]
    query, key = (
        torch.randn(1, tokens, heads, dim, device=device, dtype=DTYPES[device]).transpose(1, 2)
        for _ in range(2)
    )
    for name, config in HYPER_CONFIGS.items():
        for causal in (False, True):

            def plan(causal=causal, config=config):
                return ea.hyper_plan(query, key, causal=causal, config=config)

            native, portable = [], []
            for _ in range(ROUNDS):
                plan()  # A kernel that comes back is checked at its first call.
                native.append(clock.sample(plan, CALLS))
                with without_native_kernels():
                    portable.append(clock.sample(plan, CALLS))
            names = answering(device)
            yield {
                "kind": "planning",
                "config": name,
                "causal": causal,
                "shape": [1, heads, tokens, dim],
                "kernels": {op: names[op] for op in ("lsh_codes", "segment_order")},
                "seconds": min(native),
                "portable_seconds": min(portable),
            }
