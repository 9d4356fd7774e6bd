"""torch's ``scaled_dot_product_attention``, in every way a user could call it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.providers.protocol import Call, Side, equally_wide, too_many_copies, too_many_scores
from bench.workloads import Inputs, Workload

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Sharing = Literal["none", "gqa", "gather", "groups"]


@dataclass(frozen=True)
class Sdpa:
    """``scaled_dot_product_attention`` forced to one backend.

    Attributes:
        backend: A key of ``BACKENDS``. On a CPU ``"flash"`` is what torch chooses by itself.
        sharing: What is done about heads that are shared. ``"none"``: nothing, every query head
            has its own. ``"gqa"``: ``enable_gqa=True``. ``"gather"``: keys and values are
            copied to one head per query head. ``"groups"``: one call with ``enable_gqa`` for the
            query heads of each pair of key and value head, which copies no key and no value.
        pad: Whether the narrower of keys and values is padded with zeros to the wider, for
            backends that want one width.
    """

    backend: str
    sharing: Sharing = "none"
    pad: bool = False
    side: Side = "torch"

    @property
    def name(self) -> str:
        suffix = "" if self.sharing == "none" else f"-{self.sharing}"
        return f"sdpa-{self.backend}{suffix}{'-pad' if self.pad else ''}"

    def available(self, device: str) -> list[str]:
        if device == "cpu" and self.backend in ("cudnn", "efficient"):
            return [f"{self.backend} needs CUDA"]
        return []

    def supports(self, workload: Workload) -> list[str]:
        reasons = []
        if self.sharing == "none" and not workload.has_own_heads:
            reasons.append("heads are shared")
        if self.sharing != "none" and workload.has_own_heads:
            reasons.append("no heads are shared")
        if self.sharing == "gqa" and not workload.has_even_groups:
            reasons.append("enable_gqa takes even contiguous groups only")
        if self.sharing == "groups" and workload.has_even_groups:
            reasons.append("even groups need no splitting")
        if self.sharing == "groups" and workload.reads_a_cache:
            reasons.append("packed, one call per group is faster")
        if self.sharing == "gather":
            reasons += too_many_copies(workload)
        if self.pad and workload.d_qk == workload.d_v:
            reasons.append("keys and values are equally wide")
        if self.backend == "math":
            reasons += too_many_scores(workload)
            if self.sharing == "gqa":
                reasons += too_many_copies(workload)
            if self.sharing == "gather" and workload.has_even_groups:
                reasons.append("with enable_gqa it copies the heads by itself")
        return reasons

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        device = inputs.query.device
        is_causal, mask = _causal_or_mask(workload, device)
        key_index = torch.tensor(workload.key_index(), device=device)
        value_index = torch.tensor(workload.value_index(), device=device)
        groups = query_heads_by_pair(workload, device)

        def sdpa(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool = False) -> Tensor:
            if self.pad:
                query, key, value = equally_wide(workload, query, key, value)
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=is_causal,
                scale=workload.scale,
                enable_gqa=enable_gqa,
            )
            return out[..., : workload.d_v]

        def call() -> Tensor:
            query, key, value = inputs
            with sdpa_kernel(BACKENDS[self.backend]):
                if self.sharing == "gather":
                    return sdpa(query, key[:, key_index], value[:, value_index])
                if self.sharing != "groups":
                    return sdpa(query, key, value, enable_gqa=self.sharing == "gqa")
                outs = [
                    sdpa(query[:, heads], key[:, k : k + 1], value[:, v : v + 1], True)
                    for heads, k, v in groups.members
                ]
                return torch.cat(outs, 1)[:, groups.order]

        return call


@dataclass(frozen=True)
class Groups:
    """The query heads of each pair of key and value head, and how to put the outputs in order."""

    members: list[tuple[Tensor | slice, int, int]]
    order: Tensor | slice


def query_heads_by_pair(workload: Workload, device: torch.device) -> Groups:
    """Who reads what; contiguous groups as slices, which are views."""
    by_pair: dict[tuple[int, int], list[int]] = {}
    pairs = zip(workload.key_index(), workload.value_index(), strict=True)
    for head, pair in enumerate(pairs):
        by_pair.setdefault(pair, []).append(head)
    order = [head for heads in by_pair.values() for head in heads]
    if order == list(range(workload.q_heads)):
        # Contiguous groups are views; others have to be copied out and back.
        return Groups([(slice(h[0], h[-1] + 1), *pair) for pair, h in by_pair.items()], slice(None))
    members = [(torch.tensor(h, device=device), *pair) for pair, h in by_pair.items()]
    return Groups(members, torch.tensor(order, device=device).argsort())


def _causal_or_mask(workload: Workload, device: torch.device) -> tuple[bool, Tensor | None]:
    """SDPA's own causal flag where it means the same, else a mask, else neither."""
    if workload.causal and workload.window is None and workload.num_queries == workload.num_keys:
        return True, None
    if workload.visible_scores() == workload.num_queries * workload.num_keys:
        return False, None
    return False, workload.visible_keys(torch.arange(workload.num_queries, device=device))


def every_sdpa() -> list[Sdpa]:
    """All backends, ways to share heads, and padding where it may help."""
    return [
        Sdpa(backend, sharing, pad)
        for backend in BACKENDS
        for sharing in ("none", "gqa", "gather", "groups")
        for pad in (False, True)
        # It takes any widths and copies shared heads, so padding and splitting only slow it down.
        if backend != "math" or not (pad or sharing == "groups")
    ]
