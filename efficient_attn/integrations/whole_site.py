"""Attention layers that are replaced as a whole by one of this package, with grouped heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.gqa import GroupedLayer
from efficient_attn.convert.gqa.learned import learn_average
from efficient_attn.errors import UnsupportedError
from efficient_attn.head_map import HeadMap
from efficient_attn.integrations.site import (
    NORMS,
    Site,
    detached,
    linear_like,
    norm_weight,
    overwrite,
)
from efficient_attn.layers import GroupedQueryAttention


@dataclass(frozen=True)
class WholeSite(Site, ABC):
    """A layer in whose place one of ours is put."""

    def replace(self, root: nn.Module, grouped: GroupedLayer, learned: str | None) -> None:
        """Put a layer of ours in the place of the module; see :meth:`Site.replace`."""
        source, new, like = self.weights(), grouped.weights, getattr(self.module, self.query)
        projections = {"q_proj": linear_like(like, new.query, new.query_bias)}
        for name, kind in (("k_proj", "key"), ("v_proj", "value")):
            weights = source if learned else new
            rows, bias = getattr(weights, kind), getattr(weights, f"{kind}_bias")
            projections[name] = linear_like(like, rows, bias)
            if learned:
                learn_average(projections[name], grouped.groups, learned)
        overwrite(self.output, new.output, new.output_bias)
        self._put(root, grouped.head_map, projections)

    def make_room(self, root: nn.Module, group_sizes: Sequence[int]) -> None:
        """Put a layer of ours there whose weights are to be loaded."""
        like, before = getattr(self.module, self.query), self.weights()
        share = len(group_sizes) / self.num_kv_heads
        rows = {
            "q_proj": len(before.query),
            "k_proj": round(share * len(before.key)),
            "v_proj": round(share * len(before.value)),
        }
        kinds = {"device": like.weight.device, "dtype": like.weight.dtype}
        projections = {
            name: nn.Linear(like.in_features, size, bias=like.bias is not None, **kinds)
            for name, size in rows.items()
        }
        self._put(root, _map_of(group_sizes), projections)

    def pick(self, root: nn.Module, heads: Sequence[int], group_sizes: Sequence[int]) -> None:
        """Put a layer of ours there with some of its heads; see :meth:`Site.pick`."""
        names = ("k_proj", "v_proj")
        projections = {name: self._picked(name, heads) for name in names}
        self._put(root, _map_of(group_sizes), {"q_proj": self.module.q_proj, **projections})

    def _put(self, root: nn.Module, head_map: HeadMap, projections: dict[str, nn.Linear]) -> None:
        layer = self.layer(head_map, {**projections, "o_proj": self.output})
        root.set_submodule(self.name, layer.train(self.module.training))

    @abstractmethod
    def layer(self, head_map: HeadMap, projections: dict[str, nn.Linear]) -> GroupedQueryAttention:
        """What is put in place of the module."""


def _map_of(group_sizes: Sequence[int]) -> HeadMap:
    if len(set(group_sizes)) == 1:
        return HeadMap.gqa(sum(group_sizes), len(group_sizes))
    return HeadMap.from_group_sizes(list(group_sizes))


@dataclass(frozen=True)
class TimmSite(WholeSite):
    """A layer of timm, with one projection for queries, keys and values."""

    def weights(self) -> GroupedAttentionWeights:
        """What the layer computes with; tensors are those of the module."""
        qkv = self.module.qkv
        query, key, value = qkv.weight.detach().chunk(3)
        biases = (None,) * 3 if qkv.bias is None else qkv.bias.detach().chunk(3)
        query_norm, key_norm = (norm_weight(self.module, name) for name in NORMS)
        return GroupedAttentionWeights(
            query=query,
            key=key,
            value=value,
            output=self.output.weight.detach(),
            query_bias=biases[0],
            key_bias=biases[1],
            value_bias=biases[2],
            output_bias=detached(self.output.bias),
            query_norm=query_norm,
            key_norm=key_norm,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            inverse_frequencies=torch.zeros(0),
            scale=self.scale,
        )

    def layer(self, head_map: HeadMap, projections: dict[str, nn.Linear]) -> GroupedQueryAttention:
        """One that is called as timm's is."""
        return TimmGroupedAttention(self.module, head_map, **projections)


@dataclass(frozen=True)
class LayerSite(WholeSite):
    """A :class:`GroupedQueryAttention`; its query heads are in contiguous groups."""

    @property
    def group_sizes(self) -> list[int]:
        """How many query heads each key head serves."""
        return self.module.head_map.inverse_k().starts.diff().tolist()

    def layer(self, head_map: HeadMap, projections: dict[str, nn.Linear]) -> GroupedQueryAttention:
        """The same with another map."""
        names = ("head_dim", "v_head_dim", "causal", "window", "scale", "softcap", "top_values")
        names += ("rotary", *NORMS)
        options = {name: getattr(self.module, name) for name in names}
        return GroupedQueryAttention(
            self.module.embed_dim,
            self.num_heads,
            head_map=head_map,
            device=self.module.q_proj.weight.device,
            **options,
            **projections,
        )


class TimmGroupedAttention(GroupedQueryAttention):
    """Grouped heads in the place of ``module``, an ``Attention`` of timm."""

    def __init__(self, module: nn.Module, head_map: HeadMap, **projections: nn.Linear) -> None:
        super().__init__(
            module.qkv.in_features,
            head_map.num_q_heads,
            head_map=head_map,
            head_dim=module.head_dim,
            scale=module.scale,
            q_norm=module.q_norm,
            k_norm=module.k_norm,
            device=module.qkv.weight.device,
            **projections,
        )
        self.proj_drop = module.proj_drop
        self.train(module.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False):
        """As timm's, which adds ``attn_mask`` to the scores, or hides where it is False."""
        if is_causal:
            raise UnsupportedError("grouped attention in timm", ["is_causal is set"])
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(
                ~attn_mask, -torch.inf
            )
        return self.proj_drop(super().forward(x, bias=attn_mask))
