"""What the launch of attention to a cache decides, from shapes and the kind of device alone."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from efficient_attn.kernels.triton import _arguments, configs

LARGEST_RANK = 512
LARGEST_LATENT_ROW = 640
# Value heads side by side in one tile take this many columns at most.
_LARGEST_VALUE_BLOCK = 512
_LARGEST_SPLITS = 128
# A split may leave this much of the device idle if it saves the merging of more parts.
_GOOD_ENOUGH = 0.85

# What changes from call to call must not make Triton compile again.
NOT_SPECIALIZED = (
    "split_stride",
    "block_table_stride",
    "q_to_k_stride",
    "q_to_v_stride",
    "num_q_heads",
    "num_k_heads",
    "num_v_heads",
    "num_queries",
    "capacity",
    "window_left",
    "num_tiles",
    "num_splits",
    "smallest_split",
    "run",
)


def latent_refusals(q_latent: Tensor, q_rope: Tensor) -> list[str]:
    """Every reason why the kernels cannot run latent attention of these queries."""
    rank, rope = q_latent.shape[-1], q_rope.shape[-1]
    reasons = []
    if not 8 <= rank <= LARGEST_RANK:
        reasons.append(f"kv_lora_rank is {rank}; 8 to {LARGEST_RANK} are supported")
    if rank + rope > LARGEST_LATENT_ROW:
        reasons.append(
            f"rows of the cache are {rank} + {rope} = {rank + rope} wide; up to "
            f"{LARGEST_LATENT_ROW} are supported"
        )
    reasons += _arguments.dtype_refusals(q_latent)
    return reasons + _arguments.device_refusals(q_latent.device)


@dataclass(frozen=True)
class Plan:
    """One call, dense or paged; the values of latent attention are None, part of its keys."""

    query: Tensor
    q_rope: Tensor | None
    key: Tensor
    value: Tensor | None
    cache_lengths: Tensor
    block_table: Tensor | None
    q_to_k: Tensor | None = None
    q_to_v: Tensor | None = None
    window_left: int | None = None
    scale: float = 1.0
    softcap: float = 0.0

    @property
    def value_dim(self) -> int:
        return self.query.shape[-1] if self.value is None else self.value.shape[-1]

    @property
    def num_v_heads(self) -> int:
        return 1 if self.value is None else self.value.shape[1]

    @property
    def capacity(self) -> int:
        """How many tokens a sequence has room for."""
        blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return blocks * self.key.shape[2]

    @functools.cached_property
    def is_even(self) -> bool:
        """Whether query heads that read one key head read whole value heads, all in a row."""
        k, v = self.key.shape[1], self.num_v_heads
        return self.q_to_k is None and self.q_to_v is None and (v % k == 0 or k % v == 0)

    @functools.cached_property
    def key_blocks(self) -> tuple[int, int]:
        """How many columns of keys are loaded together, and how many of the rest after those.

        The first block of a latent row holds all of the latent, so that it can be the value.
        """
        width = self.key.shape[-1]
        if self.value is None:
            main = 1 << (width.bit_length() - 1)
            if main >= max(16, self.query.shape[-1]) and width - main <= 128:
                return main, _arguments.padded(width - main) if width > main else 0
        return _arguments.padded(width), 0

    @functools.cached_property
    def value_block(self) -> int:
        return self.key_blocks[0] if self.value is None else _arguments.padded(self.value_dim)

    @functools.cached_property
    def slots(self) -> int:
        """How many value heads are read for one reading of their key head, a power of two."""
        if not self.is_even:
            return 1
        wanted = 1 << (max(1, self.num_v_heads // self.key.shape[1]) - 1).bit_length()
        return min(wanted, _LARGEST_VALUE_BLOCK // self.value_block)

    @functools.cached_property
    def run(self) -> int:
        """How many heads in a row share a key head and SLOTS value heads."""
        heads = self.query.shape[1]
        return min(heads // self.key.shape[1], self.slots * (heads // self.num_v_heads))

    @functools.cached_property
    def tile(self) -> configs.Tile:
        heads, tokens = self.query.shape[1], self.query.shape[2]
        if self.is_even:
            rows = self.run * tokens
        else:
            # Most groups of an uneven map are smaller than twice the average.
            rows = 2 * triton.cdiv(heads, min(heads, self.key.shape[1])) * tokens
        return configs.decode_tile(
            configs.architecture(self.query.device),
            self.query.dtype.itemsize,
            rows,
            self.loaded_columns,
            latent=self.value is None,
            paged=self.block_table is not None,
        )

    @property
    def loaded_columns(self) -> int:
        """Columns of keys and values that a tile loads for each token."""
        values = 0 if self.value is None else self.slots * self.value_block
        return sum(self.key_blocks) + values

    @functools.cached_property
    def num_tiles(self) -> int:
        """The tiles of a sequence; for a map that only the device knows, the most there can be."""
        heads, tokens = self.query.shape[1], self.query.shape[2]
        rows = self.tile.rows
        if self.is_even:
            group = heads // self.key.shape[1]
            runs = self.key.shape[1] * triton.cdiv(group, self.run)
            return runs * triton.cdiv(self.run * tokens, rows)
        # Heads that read one key head and different value heads are groups apart.
        apart = self.key.shape[1] * (1 if self.same_map else self.num_v_heads)
        groups = min(heads, apart)
        return groups + (heads * tokens - groups) // rows

    @property
    def same_map(self) -> bool:
        return _arguments.same_map(self.q_to_k, self.q_to_v, self.key.shape[1], self.num_v_heads)

    @functools.cached_property
    def smallest_split(self) -> int:
        smallest = configs.smallest_split(configs.architecture(self.query.device))
        return triton.cdiv(smallest, self.tile.columns) * self.tile.columns

    @functools.cached_property
    def num_splits(self) -> int:
        """How many parts the keys of each sequence are read in."""
        reach = self.capacity
        if self.window_left is not None:
            reach = min(reach, self.window_left + self.query.shape[2] + self.tile.columns)
        programs = configs.resident_programs(
            self.query.device,
            self.tile,
            self.loaded_columns * self.query.dtype.itemsize,
            self.block_table is not None,
        )
        most = min(_LARGEST_SPLITS, max(1, triton.cdiv(reach, self.smallest_split)))
        return best_splits(self.query.shape[0] * self.num_tiles, programs, most)

    def decode_arguments(self, out: Tensor, lse: Tensor) -> dict[str, Any]:
        """The arguments of the kernel that reads the cache."""
        maps = [_arguments.contiguous(index) for index in (self.q_to_k, self.q_to_v)]
        table = _arguments.contiguous(self.block_table)
        q, q_tail = self._query_blocks()
        heads = self.query.shape[1]
        return self._shared_arguments() | {
            "out": out,
            "out_strides": _strides(out),
            "lse": lse,
            "q": q,
            "q_strides": _strides(q),
            "q_tail": q_tail,
            "q_tail_strides": None if q_tail is None else _strides(q_tail),
            "k": self.key,
            "k_strides": _strides(self.key),
            "v": self.value,
            "v_strides": None if self.value is None else _strides(self.value),
            "block_table": table,
            "block_table_stride": _arguments.row_stride(table),
            "q_to_k": maps[0],
            "q_to_k_stride": _arguments.row_stride(maps[0]),
            "q_to_v": maps[1],
            "q_to_v_stride": _arguments.row_stride(maps[1]),
            "num_k_heads": self.key.shape[1],
            "num_v_heads": self.num_v_heads,
            "scale": self.scale,
            "softcap": self.softcap if self.softcap > 0 else None,
            "num_tiles": self.num_tiles,
            "run": self.run,
            "FOLD_SCALE": self.scale >= 0 and self.softcap == 0,
            "DIM_QK": self.key.shape[-1],
            "BLOCK_QK": self.key_blocks[0],
            "BLOCK_TAIL": self.key_blocks[1],
            "SLOTS": self.slots,
            "HEADS": None if self.is_even else triton.next_power_of_2(heads),
            "PAGE_SIZE": None if table is None else self.key.shape[2],
            "ROWS": self.tile.rows,
            **self.tile.options(),
        }

    def combine_arguments(
        self, out: Tensor, lse: Tensor, parts: Tensor, part_lses: Tensor
    ) -> dict[str, Any]:
        """The arguments of the kernel that merges the parts."""
        return self._shared_arguments() | {
            "out": out,
            "out_strides": _strides(out),
            "lse": lse,
            "parts": parts,
            "part_lses": part_lses,
            "SPLITS": triton.next_power_of_2(self.num_splits),
            "TOGETHER": max(1, min(32, 4096 // self.value_block)),
            **configs.Tile(0, 0, 4, 1).options(),
        }

    def _query_blocks(self) -> tuple[Tensor, Tensor | None]:
        """Queries cut as the keys are."""
        main, tail = self.key_blocks
        if self.q_rope is None or self.q_rope.shape[-1] == 0:
            return self.query, None
        if main == self.query.shape[-1]:
            return self.query, self.q_rope
        joined = torch.cat([self.query, self.q_rope], dim=-1)
        return joined, joined[..., main:] if tail else None

    def _shared_arguments(self) -> dict[str, Any]:
        batch, heads, tokens, _ = self.query.shape
        return {
            "split_stride": batch * heads * tokens,
            "cache_lengths": self.cache_lengths.contiguous(),
            "num_q_heads": heads,
            "num_queries": tokens,
            "capacity": self.capacity,
            "window_left": _arguments.clamped(self.window_left),
            "num_splits": self.num_splits,
            "smallest_split": self.smallest_split,
            "DIM_V": self.value_dim,
            "BLOCK_V": self.value_block,
            "COLUMNS": self.tile.columns,
        }


@functools.lru_cache(maxsize=1024)
def best_splits(tiles: int, programs: int, most: int) -> int:
    """The fewest splits that keep a device of so many programs at a time about as busy as any."""
    if tiles == 0:
        return 1
    busy = []
    for splits in range(1, most + 1):
        rounds = tiles * splits / programs
        busy.append(rounds / math.ceil(rounds))
    return 1 + next(i for i, x in enumerate(busy) if x >= _GOOD_ENOUGH * max(busy))


def _strides(x: Tensor) -> tuple[Any, ...]:
    return _arguments.in_granules(*x.stride()[-4:])
