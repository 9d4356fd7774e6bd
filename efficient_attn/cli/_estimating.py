"""The part of the demo that estimates attention over a long text."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LAYER = 1
RUNS = 3


@dataclass(frozen=True)
class Estimation:
    """One layer's attention over a long text, exact and estimated.

    Attributes:
        length: Tokens of the text.
        exact_seconds: Median time of exact attention, forward.
        estimate_seconds: Median time of the estimate, its plan included.
        error: Norm of the difference of the outputs over that of the exact output.
        row_error: The same by row, where nine rows in ten have less.
    """

    length: int
    exact_seconds: float
    estimate_seconds: float
    error: float
    row_error: float

    def __str__(self) -> str:
        return (
            f"HyperAttention over {self.length} tokens: {self.exact_seconds:.2f} s exact, "
            f"{self.estimate_seconds:.2f} s estimated "
            f"({self.exact_seconds / self.estimate_seconds:.1f} times as fast); "
            f"error of the output {self.error:.1%}, below {self.row_error:.1%} in nine rows of ten"
        )


def estimate(model: PreTrainedModel, text: torch.Tensor) -> Estimation:
    """Compare :func:`hyper_attention` with exact attention on what one layer of a model asks.

    Args:
        model: A causal language model.
        text: Token ids, ``(1, N)``.
    """
    import torch

    from efficient_attn import attention, hyper_attention

    query, key, value = _asked(model, text)
    seconds: dict[str, list[float]] = {"exact": [], "estimate": []}
    with torch.no_grad():
        for _ in range(RUNS):
            for name, attend in (("exact", attention), ("estimate", hyper_attention)):
                begun = time.perf_counter()
                out = attend(query, key, value, causal=True)
                seconds[name].append(time.perf_counter() - begun)
                if name == "exact":
                    truth = out
    difference = (out - truth).norm(dim=-1)
    by_row = difference / truth.norm(dim=-1)
    return Estimation(
        text.shape[1],
        statistics.median(seconds["exact"]),
        statistics.median(seconds["estimate"]),
        float(difference.norm() / truth.norm()),
        float(by_row.flatten().kthvalue(int(0.9 * by_row.numel())).values),
    )


class _FoundError(Exception):
    """Ends the forward pass once the layer has asked."""


def _asked(model: PreTrainedModel, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of one layer over a text."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from efficient_attn.integrations.patching import patch_model

    class Watch(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.efficient_attn.attention.default:
                self.calls += 1
                if self.calls > LAYER:
                    self.found = args[:3]
                    raise _FoundError
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), patch_model(model), Watch() as watch:
        try:
            model(text, logits_to_keep=1)
        except _FoundError:
            return watch.found
    raise ValueError(f"the model has no more than {LAYER} layers.")
