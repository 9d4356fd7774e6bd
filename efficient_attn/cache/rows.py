"""What is kept of a token, and the memory that holds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from efficient_attn.errors import UnsupportedError
from efficient_attn.head_map import HeadMap


class Rows(ABC):
    """What a layer keeps of one token: one row, or one per head, in each of its parts.

    Attributes:
        names: What the parts are called.
    """

    names: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape that one token has in each part: ``(heads, dim)`` or ``(dim,)``."""

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """What one token takes in one layer."""
        return sum(torch.Size(shape).numel() for shape in self.shapes) * dtype.itemsize

    def _check_sizes(self) -> None:
        for name, size in vars(self).items():
            least = 0 if name in ("qk_rope_head_dim", "v_head_dim") else 1
            if size < least:
                raise ValueError(f"{name} is {size}; it must be at least {least}.")


@dataclass(frozen=True)
class KeyValueRows(Rows):
    """Keys and values, each with their own number of heads and their own width.

    Parts: keys ``(num_key_heads, head_dim)`` and values ``(num_value_heads, v_head_dim)``.
    """

    names = ("key", "value")

    num_key_heads: int
    num_value_heads: int
    head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        self._check_sizes()

    @classmethod
    def for_map(
        cls, head_map: HeadMap, head_dim: int, v_head_dim: int | None = None
    ) -> KeyValueRows:
        """What attention with this head map reads."""
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        return cls(head_map.num_k_heads, head_map.num_v_heads, head_dim, v_head_dim)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of a token's keys and of its values."""
        return (self.num_key_heads, self.head_dim), (self.num_value_heads, self.v_head_dim)


@dataclass(frozen=True)
class LatentRows(Rows):
    """The latent and the rotary key of multi-head latent attention, one behind the other.

    One part without heads, ``(kv_lora_rank + qk_rope_head_dim,)``.
    """

    names = ("latent",)

    kv_lora_rank: int
    qk_rope_head_dim: int

    def __post_init__(self) -> None:
        self._check_sizes()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of a token's only row."""
        return ((self.kv_lora_rank + self.qk_rope_head_dim,),)


class Pages:
    """Memory for rows, in pages of equally many tokens.

    A contiguous cache is one page for each sequence. Memory is taken and not filled: what was never
    written may hold anything, and nothing reads it.

    Args:
        rows: What a token takes.
        count: Number of pages.
        size: Tokens in a page.
        dtype: Of every part.
        device: Of every part.

    Attributes:
        parts: One tensor for each part of ``rows``, ``(count, heads, size, dim)``, or
            ``(count, size, dim)`` where there are no heads.
    """

    def __init__(
        self,
        rows: Rows,
        count: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.rows = rows
        self.parts = tuple(
            torch.empty(count, *heads, size, dim, dtype=dtype, device=device)
            for *heads, dim in rows.shapes
        )

    def write(self, page: Tensor, offset: Tensor, new: Sequence[Tensor]) -> None:
        """Write tokens to their places.

        Shape:
            - page, offset: ``(tokens,)``
            - new: for each part, ``(tokens, heads, dim)`` or ``(tokens, dim)``
        """
        for part, x in zip(self.parts, new, strict=True):
            part.movedim(-2, 1)[page, offset] = x

    def copy(self, source: int, target: int) -> None:
        """Copy a page."""
        for part in self.parts:
            part[target] = part[source]

    def check(self, new: Sequence[Tensor], batch_size: int) -> int:
        """Refuse tokens that do not belong here; returns how many there are for each sequence."""
        names, first = self.rows.names, self.parts[0]
        if len(new) != len(names):
            raise TypeError(f"append takes {' and '.join(names)}; {len(new)} tensors were passed.")
        for name, shape, x in zip(names, self.rows.shapes, new, strict=True):
            *heads, dim = shape
            wanted = (batch_size, *heads, "tokens", dim)
            got = x.shape[:-2] + x.shape[-1:] if x.dim() >= 2 else x.shape
            if x.dim() != len(wanted) or got != (batch_size, *shape):
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; this cache takes "
                    f"({', '.join(map(str, wanted))})."
                )
            if x.shape[-2] != new[0].shape[-2]:
                raise ValueError(
                    f"{name} has {x.shape[-2]} tokens and {names[0]} {new[0].shape[-2]}; every "
                    "token needs both."
                )
            if x.dtype != first.dtype:
                raise TypeError(
                    f"{name} has dtype {x.dtype} and the cache {first.dtype}; make the cache with "
                    f"dtype={x.dtype}, or pass {name}.to({first.dtype})."
                )
            if x.device != first.device:
                raise ValueError(
                    f"{name} is on {x.device} and the cache on {first.device}; move one of them."
                )
        if torch.is_grad_enabled() and any(x.requires_grad for x in new):
            raise UnsupportedError(
                "append to a cache",
                ["the new tokens carry a gradient, which would be lost in it"],
                "Call the model under torch.no_grad(), or train without a cache.",
            )
        return new[0].shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.parts)
