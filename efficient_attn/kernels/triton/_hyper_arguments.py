"""What the launchers of HyperAttention have in common: arguments, workspaces, parts of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficient_attn.kernels.triton import configs
from efficient_attn.kernels.triton._arguments import Problem, in_granules
from efficient_attn.planning import HyperPlan
from efficient_attn.planning.layout import leaf_range

# What blocks give is kept until it is merged. Where the levels of a recursion would keep more than
# one output's worth, a call is computed in this many parts, whatever its depth.
_PARTS = 4


@dataclass(frozen=True)
class HyperProblem(Problem):
    """A call of HyperAttention; heads in even groups, keys and values with the same heads."""

    plan: HyperPlan | None = None

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, *plan_and_scale) -> HyperProblem:
        *fields, scale = plan_and_scale
        plan = HyperPlan(*fields)
        tensors = [x.contiguous() if isinstance(x, Tensor) else x for x in plan]
        return cls(
            query, key, value, None, None, None, None, scale, 0.0, plan=HyperPlan(*tensors)
        )  # fmt: skip

    @property
    def num_planes(self) -> int:
        """Key heads of all samples."""
        return self.num_samples * self.num_k_heads

    @property
    def num_levels(self) -> int:
        return self.plan.key_order.shape[2]

    @property
    def halves(self) -> bool:
        """Whether at each level every other segment looks at the one before: the recursion."""
        return self.plan.causal and not self.plan.samples_by_leaf

    @property
    def has_leaves(self) -> bool:
        return self.plan.leaf_size > 0

    @property
    def leaves(self) -> range:
        """The numbers of the leaves that have queries."""
        leaf, corner = self.plan.leaf_size, self.num_keys - self.num_queries
        return range(corner // leaf, -(-self.num_keys // leaf)) if leaf else range(0)

    def query_width(self) -> int:
        """The most queries of a head that have a block at one level."""
        if not self.halves:
            return self.num_queries
        corner = max(self.num_keys - self.num_queries, 0)
        sizes = [self.plan.leaf_size << level for level in range(self.num_levels)]
        counts = ([_in_halves(n, size, 1) for n in (self.num_keys, corner)] for size in sizes)
        return max((end - first for end, first in counts), default=0)

    def key_width(self) -> int:
        """The most keys of a head that are in a block at one level."""
        if not self.halves:
            return self.num_keys
        sizes = (self.plan.leaf_size << level for level in range(self.num_levels))
        return max((_in_halves(self.num_keys, size, 0) for size in sizes), default=0)

    @property
    def columns_per_sample(self) -> int:
        """Sinks, which are like a part of each sample, and the sampled keys."""
        return self.plan.sinks + self.plan.sample_keys.shape[2]

    def workspace(self, dim: int) -> tuple[Tensor, Tensor]:
        """Room for what blocks give to the queries of every level, and for its log-sum-exp.

        That is -inf where they give nothing.
        """
        shape = (self.num_samples, self.num_q_heads, self.num_levels * self.query_width())
        lse = self.query.new_full(shape, -torch.inf, dtype=torch.float32)
        return self.query.new_empty(*shape, dim), lse

    def row_tile(self, arguments: dict[str, Any]) -> configs.Tile:
        """The tile of a kernel that walks along keys, by what it is to give."""
        forward = arguments["grad_out"] is None
        return self.tile("hyper_forward" if forward else "hyper_grad_query")

    def parts(self) -> Iterator[tuple[slice, slice, slice, HyperProblem]]:
        """Calls that make up this one: their samples, query heads and key heads, and the call.

        Parts are whole samples, or whole groups of heads of the only sample, for which the tensors
        of a plan are views.
        """
        everything = slice(None)
        if self.num_levels * self.query_width() <= self.num_queries:
            yield everything, everything, everything, self
            return
        by_sample = self.num_samples > 1
        total = self.num_samples if by_sample else self.num_k_heads
        size = -(-total // _PARTS)
        for start in range(0, total, size):
            part = slice(start, start + size)
            samples, k_heads = (part, everything) if by_sample else (everything, part)
            group = self.num_q_heads // self.num_k_heads
            q_heads = everything if by_sample else slice(part.start * group, part.stop * group)
            tensors = [x[samples, k_heads] for x in self.plan[:6]]
            plan = HyperPlan(
                *tensors, self.plan.block_sample, self.plan.sample_keys[k_heads], *self.plan[8:]
            )
            yield samples, q_heads, k_heads, HyperProblem(
                self.query[samples, q_heads], self.key[samples, k_heads],
                self.value[samples, k_heads], None, None, None, None, self.scale, 0.0, plan=plan,
            )  # fmt: skip

    def kernel_arguments(self) -> dict[str, Any]:
        """The arguments that every kernel of HyperAttention takes."""
        plan = self.plan
        shared = super().kernel_arguments()
        kept = ("q", "q_strides", "k", "k_strides", "v", "v_strides", "scale")
        kept += ("num_q_heads", "num_k_heads", "num_queries", "num_keys")
        kept += ("DIM_QK", "DIM_V", "BLOCK_QK", "BLOCK_V")
        corner = self.num_keys - self.num_queries
        first_set, _ = leaf_range(
            self.num_queries, self.num_keys, max(plan.leaf_size, 1), plan.causal
        )
        return {name: shared[name] for name in kept} | {
            "key_order": plan.key_order,
            "key_rank": plan.key_rank,
            "band_start": plan.band_start,
            "band_end": plan.band_end,
            "block_rows": plan.block_rows,
            "block_first": plan.block_first,
            "sample_keys": plan.sample_keys,
            "sample_log_weight": plan.sample_log_weight,
            "num_levels": self.num_levels,
            "num_tiles": plan.block_rows.shape[2],
            "tile_rows": plan.block_rows.shape[3],
            "num_sets": plan.sample_keys.shape[1],
            "sample_size": plan.sample_keys.shape[2],
            "block_size": plan.block_size,
            "leaf_size": plan.leaf_size,
            "window": plan.window,
            "sinks": plan.sinks,
            "first_leaf": corner // plan.leaf_size if plan.leaf_size else 0,
            "first_set": first_set,
            "HALVES": self.halves,
            "CAUSAL": plan.causal,
            "BY_LEAF": plan.samples_by_leaf,
        }


HYPER_NOT_SPECIALIZED = (
    "num_q_heads", "num_k_heads", "num_queries", "num_keys", "num_levels", "num_tiles",
    "tile_rows", "num_sets", "sample_size", "block_size", "leaf_size", "window", "sinks",
    "first_leaf", "first_set", "width", "padded_queries", "num_blocks", "num_splits",
)  # fmt: skip


def _in_halves(count: int, size: int, parity: int) -> int:
    """How many of the first ``count`` positions are in odd, or in even, segments of a size."""
    within = count % (2 * size)
    return count // (2 * size) * size + (max(within - size, 0) if parity else min(within, size))


class KeyGradients(NamedTuple):
    """Gradients of keys and of values, ``(B, Hk, rows, dim)``, or one of them alone."""

    key: Tensor | None
    value: Tensor | None

    def empty(self, rows: int) -> KeyGradients:
        """Room for the same of other rows."""
        return self._map(lambda x: x.new_empty(*x.shape[:2], rows, x.shape[-1]))

    def first_places(self, num_samples: int, count: int) -> KeyGradients:
        """The sum over all samples of what their first places get, fp32."""

        def total(x: Tensor) -> Tensor:
            of_each = x.unflatten(2, (num_samples, x.shape[2] // max(num_samples, 1)))
            return of_each[:, :, :, :count].sum(2, dtype=torch.float32)

        return self._map(total)

    def arguments(self, prefix: str) -> dict[str, Any]:
        """Both as the arguments of a kernel."""
        tensors = ((f"{prefix}_k", self.key), (f"{prefix}_v", self.value))
        strides = {
            f"{name}_strides": None if x is None else in_granules(*x.stride())
            for name, x in tensors
        }
        return dict(tensors) | strides

    def _map(self, function: Callable[[Tensor], Tensor]) -> KeyGradients:
        return KeyGradients(*(None if x is None else function(x) for x in self))
