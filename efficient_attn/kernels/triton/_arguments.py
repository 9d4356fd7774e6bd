"""What the launchers have in common: refusals, the shared kernel arguments, allocation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from efficient_attn.kernels.triton import configs

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_WINDOW = 2**30


def refusals(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Every reason why the attention kernels cannot run these inputs; empty if they can.

    Launchers rely on the caller having asked.
    """
    reasons = dtype_refusals(query)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            reasons.append(f"{name} has dtype {tensor.dtype}, but query has {query.dtype}")
    for name, tensor in (("query and key", query), ("value", value)):
        if not 8 <= tensor.shape[-1] <= 256:
            reasons.append(f"{name} have head dim {tensor.shape[-1]}; 8 to 256 are supported")
    return reasons + device_refusals(query.device)


def dtype_refusals(query: Tensor) -> list[str]:
    """Why the kernels cannot run queries of this data type."""
    if query.dtype in _DTYPES:
        return []
    return [f"query has dtype {query.dtype}; float16, bfloat16 and float32 are supported"]


def device_refusals(device: torch.device) -> list[str]:
    """Why the kernels cannot run on this device."""
    if device.type != "cuda":
        return []
    if torch.version.hip:
        return ["there are no tile tables for ROCm devices"]
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return [f"the device has compute capability {capability}; 8.0 is the lowest"]
    return []


def same_map(q_to_k: Tensor | None, q_to_v: Tensor | None, num_k: int, num_v: int) -> bool:
    """Whether keys and values are known to be shared by the same groups of query heads."""
    if num_k != num_v:
        return False
    if q_to_k is None or q_to_v is None:
        return q_to_k is q_to_v
    # Not a comparison of entries, which would wait for the device.
    return q_to_k is q_to_v or (
        q_to_k.data_ptr() == q_to_v.data_ptr()
        and q_to_k.shape == q_to_v.shape
        and q_to_k.stride() == q_to_v.stride()
    )


@dataclass(frozen=True)
class Problem:
    """One call of attention, dense or packed, as the kernels want to see it."""

    query: Tensor
    key: Tensor
    value: Tensor
    q_to_k: Tensor | None
    q_to_v: Tensor | None
    window_left: int | None
    window_right: int | None
    scale: float
    softcap: float
    bias: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def num_samples(self) -> int:
        return self.cu_seqlens_q.numel() - 1 if self.packed else self.query.shape[0]

    @property
    def num_queries(self) -> int:
        return self.max_seqlen_q if self.packed else self.query.shape[2]

    @property
    def num_keys(self) -> int:
        return self.max_seqlen_k if self.packed else self.key.shape[2]

    @property
    def num_q_heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_k_heads(self) -> int:
        return self.key.shape[1]

    @property
    def num_v_heads(self) -> int:
        return self.value.shape[1]

    @property
    def same_map(self) -> bool:
        """Whether keys and values are known to be shared by the same groups of query heads."""
        return same_map(self.q_to_k, self.q_to_v, self.num_k_heads, self.num_v_heads)

    def strides(self, x: Tensor) -> tuple[Any, ...]:
        """Strides of a dense or packed tensor, as kernels take them."""
        if self.packed:
            return in_granules(None, x.stride(1), x.stride(0), x.stride(2))
        return in_granules(*x.stride())

    def allocate(self, like: Tensor, head_dim: int) -> Tensor:
        """An output with the tokens and heads of ``like``, stored tokens-major.

        Packed outputs begin at zero, since a token may belong to no sequence.
        """
        if self.packed:
            return like.new_zeros(*like.shape[:2], head_dim)
        batch, heads, tokens, _ = like.shape
        return like.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)

    def tile(self, kernel: str) -> configs.Tile:
        """The tile that a kernel takes for these inputs on their device."""
        return configs.tile(
            kernel,
            configs.architecture(self.query.device),
            self.query.dtype.itemsize,
            (self.query.shape[-1], self.value.shape[-1]),
            with_bias=self.bias is not None,
            with_window_or_softcap=self.window_left is not None or self.softcap > 0,
        )

    def launch(self, kernel: Any, grid: int, tile: configs.Tile, **arguments: Any) -> None:
        """Launch a kernel on the device of the inputs, if there is anything to do."""
        if grid == 0:
            return
        sizes = {"ROWS": tile.rows} | ({"COLUMNS": tile.columns} if tile.columns else {})
        with torch.cuda.device_of(self.query):
            kernel[(grid,)](**arguments, **sizes, **tile.options())

    def heads_together(self) -> int:
        """How many query heads run together, so that their keys and values stay in the L2 cache."""
        key_bytes = self.num_keys * self.num_k_heads * self.query.shape[-1]
        value_bytes = self.num_keys * self.num_v_heads * self.value.shape[-1]
        sections = max(1, -(-(key_bytes + value_bytes) * self.query.itemsize // configs.L2_BUDGET))
        group = max(1, self.num_q_heads // max(self.num_k_heads, self.num_v_heads))
        return min(self.num_q_heads, -(-self.num_q_heads // (sections * group)) * group)

    def groups_together(self, num_groups: int) -> int:
        """The same for groups, which share the queries and output gradients of their members."""
        head_dims = self.query.shape[-1] + self.value.shape[-1]
        size = self.num_queries * self.num_q_heads * head_dims * self.query.itemsize
        return -(-num_groups // max(1, -(-size // configs.L2_BUDGET)))

    def kernel_arguments(self) -> dict[str, Any]:
        """The arguments that every attention kernel takes; the features not asked for are None."""
        bias = self.bias
        if bias is not None:
            shape = (self.num_samples, self.num_q_heads, self.num_queries, self.num_keys)
            bias = bias.expand(shape)
        q_to_k, q_to_v = (contiguous(index) for index in (self.q_to_k, self.q_to_v))
        head_dim, value_dim = self.query.shape[-1], self.value.shape[-1]
        return {
            "q": self.query,
            "q_strides": self.strides(self.query),
            "k": self.key,
            "k_strides": self.strides(self.key),
            "v": self.value,
            "v_strides": self.strides(self.value),
            "bias": bias,
            "bias_strides": None if bias is None else in_granules(*bias.stride()),
            "q_to_k": q_to_k,
            "q_to_k_stride": row_stride(q_to_k),
            "q_to_v": q_to_v,
            "q_to_v_stride": row_stride(q_to_v),
            "key_lengths": contiguous(self.key_lengths),
            "cu_seqlens_q": contiguous(self.cu_seqlens_q),
            "cu_seqlens_k": contiguous(self.cu_seqlens_k),
            "num_q_heads": self.num_q_heads,
            "num_k_heads": self.num_k_heads,
            "num_v_heads": self.num_v_heads,
            "num_queries": self.num_queries,
            "num_keys": self.num_keys,
            "window_left": clamped(self.window_left),
            "window_right": clamped(self.window_right),
            "scale": self.scale,
            "softcap": self.softcap if self.softcap > 0 else None,
            "DIM_QK": head_dim,
            "DIM_V": value_dim,
            "BLOCK_QK": padded(head_dim),
            "BLOCK_V": padded(value_dim),
        }


# What changes from call to call must not make Triton compile again.
NOT_SPECIALIZED = (
    "q_to_k_stride",
    "q_to_v_stride",
    "num_q_heads",
    "num_k_heads",
    "num_v_heads",
    "num_queries",
    "num_keys",
    "window_left",
    "window_right",
    "num_blocks",
    "heads_together",
    "num_groups",
    "padded_queries",
    "starts_stride",
    "members_stride",
)


def in_granules(batch: int | None, heads: int, tokens: int, dim: int) -> tuple[Any, ...]:
    """The strides and the largest granule, 8 elements or 1, of which the first three are multiples.

    Triton itself only notices multiples of 16, which the rows of a head dim of 40 or 72 are not.
    """
    outer = (batch, heads, tokens)
    granule = 1 if any(stride is not None and stride % 8 for stride in outer) else 8
    counted = (None if stride is None else stride // granule for stride in outer)
    return (*counted, dim, tl.constexpr(granule))


def contiguous(x: Tensor | None) -> Tensor | None:
    """An index as the kernels read it, without strides."""
    return None if x is None else x.contiguous()


def row_stride(index: Tensor | None) -> int:
    """How far apart the rows of a contiguous index lie; 0 where there is one for all samples."""
    return index.shape[-1] if index is not None and index.dim() == 2 else 0


def clamped(window: int | None) -> int | None:
    """A limit of the window that 32 bits hold, also after adding a position."""
    return None if window is None else max(-_LARGEST_WINDOW, min(window, _LARGEST_WINDOW))


def padded(dim: int) -> int:
    """The number of columns of a tile for this many."""
    return max(16, 1 << (dim - 1).bit_length())
