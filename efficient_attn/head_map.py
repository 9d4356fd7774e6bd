"""Which key head and which value head each query head reads.

Multi-head, multi-query, grouped-query, key-driven and DiffQKV attention differ in nothing else, so
they are constructors of one object here and have no name in any kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class HeadGroups(NamedTuple):
    """The inverse of a head index: the query heads that read each key (or value) head.

    Compressed sparse rows: group ``g`` is ``members[starts[g]:starts[g + 1]]``, in ascending order.

    Shape:
        - starts: ``(G + 1,)`` or ``(B, G + 1)``, int32
        - members: ``(Hq,)`` or ``(B, Hq)``, int32
    """

    starts: Tensor
    members: Tensor


def head_groups(index: Tensor, num_heads: int) -> HeadGroups:
    """Invert a head index on its own device, without a host synchronisation.

    Args:
        index: The head that each query head reads, ``(Hq,)`` or ``(B, Hq)``.
        num_heads: The number of heads ``G`` that can be read; some may be read by nobody.
    """
    members = torch.argsort(index, dim=-1, stable=True).to(torch.int32)
    heads = torch.arange(num_heads, device=index.device)
    counts = (index.unsqueeze(-2) == heads.unsqueeze(-1)).sum(-1)
    starts = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).to(torch.int32)
    return HeadGroups(starts, members)


@dataclass(frozen=True)
class HeadMap:
    """The head map of one attention call.

    An index of ``None`` means even contiguous groups (query head ``h`` reads head
    ``h // (num_q_heads // num_heads)``), which kernels serve without loading an index. Otherwise it
    is an int32 tensor of shape ``(Hq,)``, or ``(B, Hq)`` with one row per sample.
    """

    num_q_heads: int
    num_k_heads: int
    num_v_heads: int
    q_to_k: Tensor | None = None
    q_to_v: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("num_q_heads", "num_k_heads", "num_v_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        _check_index("q_to_k", self.q_to_k, self.num_q_heads, self.num_k_heads, "key")
        _check_index("q_to_v", self.q_to_v, self.num_q_heads, self.num_v_heads, "value")

    @classmethod
    def mha(cls, num_heads: int) -> HeadMap:
        """Multi-head attention: every query head has its own key and value head."""
        return cls(num_heads, num_heads, num_heads)

    @classmethod
    def mqa(cls, num_heads: int) -> HeadMap:
        """Multi-query attention: one key and value head for all."""
        return cls(num_heads, 1, 1)

    @classmethod
    def gqa(cls, num_heads: int, num_kv_heads: int) -> HeadMap:
        """Grouped-query attention: even contiguous groups."""
        return cls(num_heads, num_kv_heads, num_kv_heads)

    @classmethod
    def diff(cls, num_heads: int, *, k: int, v: int) -> HeadMap:
        """DiffQKV: independent numbers of key and value heads, each in even contiguous groups."""
        return cls(num_heads, k, v)

    @classmethod
    def from_group_sizes(
        cls, sizes: Sequence[int] | Tensor, *, num_q_heads: int | None = None
    ) -> HeadMap:
        """Uneven contiguous groups: key/value head ``g`` serves the next ``sizes[g]`` query heads.

        Args:
            sizes: ``(G,)``, or ``(B, G)`` with one row per sample; zeros leave a head unread.
            num_q_heads: The sum of a row. Needed for sizes that live on an accelerator, where
                reading them would wait for the device.
        """
        sizes = torch.as_tensor(sizes)
        if sizes.dim() not in (1, 2) or sizes.is_floating_point():
            raise ValueError(
                f"sizes has shape {tuple(sizes.shape)} and dtype {sizes.dtype}; "
                "pass integers of shape (G,) or (B, G)."
            )
        if num_q_heads is None:
            if sizes.device.type != "cpu":
                raise ValueError(
                    f"sizes is on {sizes.device} and num_q_heads was not given; "
                    "pass num_q_heads so that the sizes need not be read back from the device."
                )
            num_q_heads = int(sizes.reshape(-1, sizes.shape[-1])[0].sum())
        if is_readable(sizes):
            wrong = (sizes < 0).any() or (sizes.sum(-1) != num_q_heads).any()
            if wrong:
                raise ValueError(
                    f"group sizes {sizes.tolist()} must be non-negative and each row must sum to "
                    f"num_q_heads={num_q_heads}."
                )
        ends = sizes.cumsum(-1)
        heads = torch.arange(num_q_heads, device=sizes.device).expand(
            *sizes.shape[:-1], num_q_heads
        )
        # right=True steps over empty groups, whose end equals their start.
        index = torch.searchsorted(ends, heads.contiguous(), right=True).to(torch.int32)
        num_kv_heads = sizes.shape[-1]
        return cls(num_q_heads, num_kv_heads, num_kv_heads, index, index)

    @classmethod
    def from_index(
        cls,
        q_to_k: Sequence[int] | Tensor,
        q_to_v: Sequence[int] | Tensor | None = None,
        *,
        num_k_heads: int | None = None,
        num_v_heads: int | None = None,
    ) -> HeadMap:
        """Any map at all.

        Args:
            q_to_k: Key head of each query head, ``(Hq,)`` or ``(B, Hq)``.
            q_to_v: Value head of each query head; by default the same as ``q_to_k``.
            num_k_heads: Number of key heads; by default the largest index plus one.
            num_v_heads: The same for value heads.
        """
        q_to_k = torch.as_tensor(q_to_k)
        q_to_v = q_to_k if q_to_v is None else torch.as_tensor(q_to_v)
        same = q_to_v is q_to_k
        if num_k_heads is None:
            num_k_heads = _largest("q_to_k", "num_k_heads", q_to_k) + 1
        if num_v_heads is None:
            num_v_heads = num_k_heads if same else _largest("q_to_v", "num_v_heads", q_to_v) + 1
        num_q_heads = q_to_k.shape[-1] if q_to_k.dim() else 0
        q_to_k = _as_int32(q_to_k)
        # One tensor where it is one map, which kernels notice.
        q_to_v = q_to_k if same else _as_int32(q_to_v)
        return cls(num_q_heads, num_k_heads, num_v_heads, q_to_k, q_to_v)

    def to(self, device: torch.device | str) -> HeadMap:
        """The same map with its indices on ``device``."""
        k = None if self.q_to_k is None else self.q_to_k.to(device)
        if self.q_to_v is self.q_to_k:
            return replace(self, q_to_k=k, q_to_v=k)
        return replace(
            self, q_to_k=k, q_to_v=None if self.q_to_v is None else self.q_to_v.to(device)
        )

    def key_index(self, device: torch.device | str | None = None) -> Tensor:
        """``q_to_k`` written out also where it is implied, ``(Hq,)`` or ``(B, Hq)``."""
        return _written_out(self.q_to_k, self.num_q_heads, self.num_k_heads, device)

    def value_index(self, device: torch.device | str | None = None) -> Tensor:
        """``q_to_v`` written out also where it is implied, ``(Hq,)`` or ``(B, Hq)``."""
        return _written_out(self.q_to_v, self.num_q_heads, self.num_v_heads, device)

    def inverse_k(self) -> HeadGroups:
        """The query heads that read each key head."""
        return head_groups(self.key_index(), self.num_k_heads)

    def inverse_v(self) -> HeadGroups:
        """The query heads that read each value head."""
        return head_groups(self.value_index(), self.num_v_heads)


def _written_out(
    index: Tensor | None, num_q_heads: int, num_heads: int, device: torch.device | str | None
) -> Tensor:
    if index is not None:
        return index if device is None else index.to(device)
    heads = torch.arange(num_q_heads, device=device, dtype=torch.int32)
    return heads // (num_q_heads // num_heads)


def _as_int32(index: Tensor) -> Tensor:
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"a head index has dtype {index.dtype}; pass integers.")
    return index.to(torch.int32)


def _largest(name: str, count: str, index: Tensor) -> int:
    if index.device.type != "cpu":
        raise ValueError(
            f"{name} is on {index.device} and {count} was not given; "
            f"pass {count} so that the index need not be read back from the device."
        )
    return int(index.max()) if index.numel() else -1


def is_readable(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor


def _check_index(
    name: str, index: Tensor | None, num_q_heads: int, num_heads: int, kind: str
) -> None:
    if index is None:
        if num_q_heads % num_heads:
            raise ValueError(
                f"{num_heads} {kind} heads do not divide {num_q_heads} query heads evenly. Use "
                "HeadMap.from_group_sizes([...]) or HeadMap.from_index([...]) for uneven groups."
            )
        return
    if index.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {index.dtype}; it must be int32.")
    if index.dim() not in (1, 2) or index.shape[-1] != num_q_heads:
        raise ValueError(
            f"{name} has shape {tuple(index.shape)}; it must be ({num_q_heads},), or "
            f"(batch, {num_q_heads}) with one row per sample."
        )
    if is_readable(index) and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= num_heads:
            raise ValueError(
                f"{name} ranges from {low} to {high}, but there are {num_heads} {kind} heads; "
                f"every entry must lie in [0, {num_heads - 1}]."
            )
