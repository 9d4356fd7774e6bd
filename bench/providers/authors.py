"""The published implementation of HyperAttention, where a checkout of it is at hand.

Nothing of it is part of this package. It draws another plan than ours from the same distribution,
and differs from the paper in places, so no truth is known of its results: they are judged by
plausibility alone, shown beside the others, and never compared with.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.providers.protocol import Call, Side
from bench.workloads import HYPER_CONFIGS, Inputs, Workload

VARIABLE = "EFFICIENT_ATTN_AUTHORS_HYPER"
MODULE = "hyper_attn"


@dataclass(frozen=True)
class AuthorsHyper:
    """``hyper_attn.HyperAttention`` from the folder that ``EFFICIENT_ATTN_AUTHORS_HYPER`` names.

    Attributes:
        own_kernels: Whether with the Triton kernels of its authors, or by operations of torch.
    """

    own_kernels: bool = False
    side: Side = "estimate"

    @property
    def name(self) -> str:
        return f"authors-hyper{'-triton' if self.own_kernels else ''}"

    def available(self, device: str) -> list[str]:
        folder = os.environ.get(VARIABLE, "")
        reasons = []
        if not folder:
            reasons.append(f"{VARIABLE} names no checkout of the authors' HyperAttention")
        elif not any((Path(folder) / name).exists() for name in (f"{MODULE}.py", MODULE)):
            reasons.append(f"there is no {MODULE} in the folder that {VARIABLE} names")
        if self.own_kernels and device == "cpu":
            reasons.append("the kernels of its authors need CUDA")
        return reasons

    def supports(self, workload: Workload) -> list[str]:
        if workload.op != "hyper" or workload.hyper != "paper":
            return ["it is for HyperAttention with the published parameters"]
        return [] if workload.has_own_heads else ["it takes as many key heads as query heads"]

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        published = HYPER_CONFIGS[workload.hyper]
        estimate = _class()(
            input_dim=workload.d_qk,
            lsh_num_projs=published.num_projections,
            block_size=published.block_size,
            sample_size=published.sample_size,
            min_seq_len=published.exact_below,
            cuda=self.own_kernels,
        ).to(device=inputs.query.device, dtype=inputs.query.dtype)
        # It wants tensors as a whole, so the copies are part of what a call costs.
        return lambda: estimate(
            *(x.contiguous() for x in inputs), scale=workload.scale, causal=workload.causal
        )


def _class() -> Callable:
    """Import the class from the folder that is named, in whatever process this is.

    The folder stays on the path, last, for what its modules import when they are called.
    """
    folder = Path(os.environ[VARIABLE]).resolve()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    module = importlib.import_module(MODULE)
    if folder not in Path(module.__file__).resolve().parents:
        raise RuntimeError(f"{MODULE} was found outside of the folder that {VARIABLE} names.")
    return module.HyperAttention
