"""An attention layer of a model whose weights can be read and replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.gqa import GroupedLayer
from efficient_attn.convert.gqa.learned import learn_average
from efficient_attn.errors import UnsupportedError

NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Site:
    """One attention layer with a projection each for queries, keys, values and the output.

    Attributes:
        name: Of the module in its model.
        module: What is called with the tokens.
        query: Projection of queries, an attribute of ``module``; so ``key`` and ``value``.
        output: The output projection, which may lie outside of ``module``.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        scale: Factor on the scores.
        pairs: Rotary pairs of a head.
    """

    name: str
    module: nn.Module
    query: str
    key: str
    value: str
    output: nn.Linear
    num_heads: int
    num_kv_heads: int
    scale: float
    pairs: int = 0

    def weights(self) -> GroupedAttentionWeights:
        """What the layer computes with; tensors are those of the module."""
        query, key, value = (getattr(self.module, n) for n in (self.query, self.key, self.value))
        query_norm, key_norm = (norm_weight(self.module, name) for name in NORMS)
        return GroupedAttentionWeights(
            query=query.weight.detach(),
            key=key.weight.detach(),
            value=value.weight.detach(),
            output=self.output.weight.detach(),
            query_bias=detached(query.bias),
            key_bias=detached(key.bias),
            value_bias=detached(value.bias),
            output_bias=detached(self.output.bias),
            query_norm=query_norm,
            key_norm=key_norm,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            # How fast pairs turn does not matter to grouping.
            inverse_frequencies=torch.zeros(self.pairs),
            scale=self.scale,
        )

    def replace(self, root: nn.Module, grouped: GroupedLayer, learned: str | None) -> None:
        """Put other weights in place; those of uneven groups with their map.

        Args:
            root: The model.
            grouped: The new layer.
            learned: Keep all heads and average them by weights per ``"head"``, ``"row"`` or
                ``"column"`` that are to be trained, in place of the weights of ``grouped``.
        """
        module, weights = self.module, grouped.weights
        for name, kind in ((self.key, "key"), (self.value, "value")):
            if learned is None:
                rows, bias = getattr(weights, kind), getattr(weights, f"{kind}_bias")
                setattr(module, name, linear_like(getattr(module, name), rows, bias))
            else:
                learn_average(getattr(module, name), grouped.groups, learned)
        overwrite(getattr(module, self.query), weights.query, weights.query_bias)
        overwrite(self.output, weights.output, weights.output_bias)
        self.tell(grouped.group_sizes)

    @property
    def group_sizes(self) -> list[int]:
        """How many query heads each key head serves."""
        even = [self.num_heads // self.num_kv_heads] * self.num_kv_heads
        return list(getattr(self.module, "kv_group_sizes", even))

    def pick(self, root: nn.Module, heads: Sequence[int], group_sizes: Sequence[int]) -> None:
        """Keep the key and value heads named, in this order; one may be named more than once.

        Args:
            root: The model.
            heads: Numbers of heads of the layer as it is.
            group_sizes: How many query heads each of them serves.
        """
        for name in (self.key, self.value):
            setattr(self.module, name, self._picked(name, heads))
        self.tell(group_sizes)

    def _picked(self, name: str, heads: Sequence[int]) -> nn.Linear:
        projection = getattr(self.module, name)
        rows = (projection.weight.detach(), detached(projection.bias))
        picked = [
            None
            if x is None
            else x.unflatten(0, (self.num_kv_heads, -1))[list(heads)].flatten(0, 1)
            for x in rows
        ]
        return linear_like(projection, *picked)

    def make_room(self, root: nn.Module, group_sizes: Sequence[int]) -> None:
        """Give the layer projections of the size of grouped ones, before they are loaded."""
        head_dim = len(getattr(self.module, self.key).weight) // self.num_kv_heads
        for name in (self.key, self.value):
            before = getattr(self.module, name)
            rows, bias = len(group_sizes) * head_dim, before.bias is not None
            like = {"device": before.weight.device, "dtype": before.weight.dtype}
            setattr(self.module, name, nn.Linear(before.in_features, rows, bias=bias, **like))
        self.tell(group_sizes)

    def tell(self, group_sizes: Sequence[int]) -> None:
        """Let the layer know how many query heads each key head serves."""
        if len(set(group_sizes)) == 1:
            vars(self.module).pop("kv_group_sizes", None)
            self.module.num_key_value_groups = group_sizes[0]
            return
        # What repeats keys by a number must not find one.
        vars(self.module).pop("num_key_value_groups", None)
        self.module.kv_group_sizes = tuple(group_sizes)
        self.module.register_forward_pre_hook(_refuse_other_attention)


def _refuse_other_attention(module: nn.Module, args: tuple) -> None:
    from efficient_attn.integrations.transformers import NAME, NAME_FOR_SOME_LAYERS

    given = module.config._attn_implementation
    if hasattr(module, "kv_group_sizes") and given not in (NAME, NAME_FOR_SOME_LAYERS):
        raise UnsupportedError(
            f"attention by {given!r}",
            ["query heads share keys in uneven groups, which it would take for even ones"],
            f'Use attn_implementation="{NAME}".',
        )


def linear_like(like: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A projection with these weights that trains if ``like`` does."""
    made = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            parameter = nn.Parameter(tensor.clone(), like.weight.requires_grad)
            setattr(made, name, parameter)
    return made.train(like.training)


@torch.no_grad()
def overwrite(projection: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Other numbers in a projection of the same size."""
    projection.weight.copy_(weight)
    if bias is not None:
        projection.bias.copy_(bias)


def norm_weight(module: nn.Module, name: str) -> Tensor | None:
    """The weight of a norm on heads, or what says that there is one."""
    norm = getattr(module, name, None)
    if norm is None or isinstance(norm, nn.Identity):
        return None
    weight = getattr(norm, "weight", None)
    return torch.ones(module.head_dim) if weight is None else weight.detach()


def detached(x: Tensor | None) -> Tensor | None:
    """Without a graph, if there is anything."""
    return None if x is None else x.detach()
