"""What quality is measured of: exact attention, a window with sinks, and estimates, in any model.

A window is compared with an estimate that evaluates as many pairs of a query and a key; pairs are
counted in what was run.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_attn import HyperConfig, HyperPlan, hyper_attention, patch_model

NAME = "bench_attention"


@dataclass(frozen=True)
class Masked:
    """Exact attention to the keys that ``mask``, bool ``(N, N)``, shows."""

    mask: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None):
        return scaled_dot_product_attention(
            query, key, value, self.mask, scale=scale, enable_gqa=True
        )

    @contextlib.contextmanager
    def inside(self, model: nn.Module, layers: list[int]) -> Iterator[None]:
        with calling(self.attend, [attention_layers(model)[i] for i in layers]):
            yield


@dataclass(frozen=True)
class Estimated:
    """HyperAttention."""

    config: HyperConfig
    causal: bool
    seed: int = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return hyper_attention(
            query, key, value, causal=self.causal, config=self.config, seed=self.seed
        )

    @contextlib.contextmanager
    def inside(self, model: nn.Module, layers: list[int]) -> Iterator[None]:
        with patch_model(model, attention=self.config, seed=self.seed, layers=layers):
            yield


def full(length: int, causal: bool) -> Masked:
    """Exact attention."""
    mask = torch.ones(length, length, dtype=torch.bool)
    return Masked(mask.tril() if causal else mask)


def window(length: int, sinks: int, pairs: float, causal: bool) -> Masked:
    """The narrowest window with sinks that evaluates at least so many pairs per query."""
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    for width in range(1, 2 * length):
        seen = distance < width if causal else 2 * distance.abs() < width
        seen[:, :sinks] = True
        if causal:
            seen &= distance >= 0
        if seen.sum() >= pairs * length:
            break
    return Masked(seen)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """In the order in which :func:`patch_model` numbers them."""
    kinds = ("LlamaAttention", "BertSelfAttention")
    return [module for module in model.modules() if type(module).__name__ in kinds]


@contextlib.contextmanager
def calling(attend: Callable, layers: list[nn.Module]) -> Iterator[None]:
    """Let layers of transformers call ``attend(query, key, value, scale)``."""
    from transformers import AttentionInterface

    def forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        return attend(query, key, value, scaling).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, forward)
    before = [layer.config for layer in layers]
    for layer in layers:
        layer.config = copy.copy(layer.config)
        layer.config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for layer, config in zip(layers, before, strict=True):
            layer.config = config


class CountPairs(TorchDispatchMode):
    """Counts the pairs that ``hyper_attention`` evaluates, per query and head."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.queries = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.efficient_attn.hyper_attention.default:
            query, key, _, *plan, _ = args
            plan = HyperPlan(*plan)
            self.pairs += pairs_of(plan, query, key)
            # Samples whose mass is limited are a call of their own, for the same queries.
            self.queries += query.shape[:3].numel() if plan.window >= 0 else 0
        return function(*args, **(kwargs or {}))

    @property
    def per_query(self) -> float:
        return self.pairs / max(self.queries, 1)


def pairs_of(plan: HyperPlan, query: Tensor, key: Tensor) -> int:
    """Scores that a plan evaluates; what is both near and in a block counts twice."""
    heads, nq, nk = query.shape[:2].numel(), query.shape[2], key.shape[2]
    position, leaf = torch.arange(nk - nq, nk), plan.leaf_size
    has_blocks = plan.block_rows.shape[2] > 0
    total = int((plan.band_end - plan.band_start).sum()) if has_blocks else 0
    if leaf:
        leaf_start = position // leaf * leaf
        start = (leaf_start - plan.window).clamp(min=0)
        stop = position + 1 if plan.causal else (leaf_start + leaf + plan.window).clamp(max=nk)
        near = (stop - start).clamp(min=0)
        total += heads * int((near + start.clamp(max=plan.sinks)).sum())
    if not plan.samples_by_leaf:
        return total + int((plan.block_rows >= 0).sum()) * plan.sample_keys.shape[-1]
    first_leaf = 0 if plan.causal else min((nk - nq) // leaf, 0)
    drawn = plan.sample_log_weight.isfinite().sum(-1)
    return total + heads * int(drawn[position // leaf - first_leaf].sum())
