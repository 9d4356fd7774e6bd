"""What attention layers have in common whose map follows the norms of the key heads."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from efficient_attn.functional import allocate_heads
from efficient_attn.functional.grouping import (
    Normalization,
    Rounding,
    check_choice,
    check_grouping,
)
from efficient_attn.head_map import HeadMap
from efficient_attn.layers.grouped import MAP_NAMES, GroupedQueryAttention

Compat = Literal["khan2024"]


class KeyDrivenAttention(GroupedQueryAttention):
    """A layer with a map of its own that changes, and a memory of key norms that it comes from.

    The map is in the buffers ``q_to_k`` and ``q_to_v``, as that of a layer with an explicit map, so
    that the projections and the map of a frozen layer load into a plain
    :class:`GroupedQueryAttention`. State changes in training mode alone, once for every call:
    neither evaluation nor the recomputation of activation checkpointing touches it. A state dict
    without it, of a layer with even groups, loads as even groups.

    Attributes:
        norm_memory: What is remembered of the norms, ``(G,)``, fp32.
        num_updates: How often that has changed.
        is_frozen: Whether the map is final.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int,
        normalization: Normalization,
        rounding: Rounding | None,
        min_queries: int,
        beta: float,
        compat: Compat | None,
        process_group: ProcessGroup | None,
        **options: object,
    ) -> None:
        name = type(self).__name__
        if "head_map" in options:
            raise TypeError(f"{name} makes its own head_map; pass num_kv_heads.")
        if num_kv_heads < 1:
            raise ValueError(f"num_kv_heads is {num_kv_heads}; it must be at least 1.")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta is {beta}; it must lie in [0, 1), the weight of the past.")
        check_choice("compat", compat, (None, "khan2024"))
        if rounding is None:
            rounding = "remainder" if compat is None else "nearest"
        check_grouping(num_kv_heads, num_heads, min_queries, normalization, rounding)
        # Scores that are equal give even groups, also where the counts do not divide.
        _, index = allocate_heads(torch.zeros(num_kv_heads, device="cpu"), num_heads)
        head_map = HeadMap(num_heads, num_kv_heads, num_kv_heads, index, index)
        super().__init__(embed_dim, num_heads, head_map=head_map, **options)
        self.normalization = normalization
        self.rounding = rounding
        self.min_queries = min_queries
        self.beta = beta
        self.compat = compat
        self.process_group = process_group
        self._frozen = False
        self._add_state("norm_memory", (num_kv_heads,), torch.float32)
        self._add_state("num_updates", (), torch.int64)
        self._add_state("is_frozen", (), torch.bool)

    @property
    def head_map(self) -> HeadMap:
        """The layer's own head map, as it is now."""
        # One tensor, which kernels notice; and a copy, which training may not change any more.
        return self._as_map(self.q_to_k.clone())

    @property
    def group_sizes(self) -> Tensor:
        """How many query heads each key head serves under that map, ``(G,)``."""
        return self.head_map.inverse_k().starts.diff()

    def freeze(self) -> None:
        """Keep the map as it is now, for good. It is saved with the layer."""
        self.is_frozen.fill_(True)
        self._frozen = True

    def reset_parameters(self) -> None:
        """Reinitialise projections and norms; forget all norms and return to even groups."""
        super().reset_parameters()
        for name in self._state_names:
            getattr(self, name).zero_()
        self._frozen = False

    def extra_repr(self) -> str:
        """That of the layer with an explicit map, and how the map comes about."""
        shown = ("normalization", "rounding", "min_queries", "compat")
        options = (f"{name}={getattr(self, name)!r}" for name in shown)
        return ", ".join([super().extra_repr(), *options, *(["frozen"] if self._frozen else [])])

    @property
    def _state_names(self) -> list[str]:
        own = dict(self.named_buffers(recurse=False))
        return [name for name in own if name not in MAP_NAMES]

    def _add_state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=self.q_to_k.device))

    def _as_map(self, index: Tensor) -> HeadMap:
        return HeadMap.from_index(index, num_k_heads=self.num_key_heads)

    def _allocate(self, scores: Tensor) -> Tensor:
        options = {"normalization": self.normalization, "rounding": self.rounding}
        return allocate_heads(scores, self.num_heads, min_queries=self.min_queries, **options)[1]

    def _set_map(self, index: Tensor) -> None:
        for name in MAP_NAMES:
            getattr(self, name).copy_(index)

    @property
    def _hides_later_keys(self) -> bool:
        return self.causal or (self.window is not None and self.window[1] == 0)

    @property
    def _learns(self) -> bool:
        """Whether this call may change the state."""
        return self.training and not self._frozen

    def _over_batch(self, norms: Tensor) -> Tensor:
        """One row of norms for the samples of all ranks: their mean, or their sum as published.

        A mean does not fall when the last batch is smaller.
        """
        total = torch.cat([norms.sum(0), norms.new_full((1,), len(norms))])
        # Ranks train together; whether they evaluate together, nobody knows.
        if self.process_group is not None and self.training:
            torch.distributed.all_reduce(total, group=self.process_group)
        return total[:-1] if self.compat else total[:-1] / total[-1].clamp(min=1.0)

    def _apply(self, fn, recurse=True):
        # Norms stay in fp32 when the layer is cast, as they are computed.
        super()._apply(fn, recurse)
        for name in self._state_names:
            if getattr(self, name).is_floating_point():
                setattr(self, name, getattr(self, name).float())
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        for name in MAP_NAMES:
            state_dict.setdefault(prefix + name, getattr(self._initial_head_map, name))
        if not torch.equal(*(state_dict[prefix + name] for name in MAP_NAMES)):
            error_msgs.append(
                f"{prefix}q_to_k and {prefix}q_to_v differ, which no {type(self).__name__} has; "
                "load them into GroupedQueryAttention."
            )
        for name in self._state_names:
            like = getattr(self, name)
            fresh = torch.zeros(like.shape, dtype=like.dtype, device="cpu")
            state_dict.setdefault(prefix + name, fresh)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if not self.is_frozen.is_meta:
            self._frozen = bool(self.is_frozen)
