"""Attention layers of models of transformers and timm whose weights can be read and replaced."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.gqa import GroupedLayer
from efficient_attn.convert.gqa.learned import learn_average
from efficient_attn.errors import UnsupportedError
from efficient_attn.head_map import HeadMap
from efficient_attn.layers import GroupedQueryAttention

# Attention classes of transformers by the names of their projections. All of them that are rotary
# pair channel f with f + F.
SEPARATE = {
    **dict.fromkeys(
        (
            *("LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention"),
            *("Qwen2MoeAttention", "Qwen3Attention", "Qwen3MoeAttention", "ViTAttention"),
        ),
        ("q_proj", "k_proj", "v_proj"),
    ),
    **dict.fromkeys(("BertSelfAttention", "RobertaSelfAttention"), ("query", "key", "value")),
}
KNOWN = (*SEPARATE, "timm's Attention")


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
    pairs: int = 0

    def weights(self) -> GroupedAttentionWeights:
        """What the layer computes with; tensors are those of the module."""
        query, key, value = (getattr(self.module, n) for n in (self.query, self.key, self.value))
        query_norm, key_norm = (_norm(self.module, name) for name in NORMS)
        return GroupedAttentionWeights(
            query=query.weight.detach(),
            key=key.weight.detach(),
            value=value.weight.detach(),
            output=self.output.weight.detach(),
            query_bias=_detached(query.bias),
            key_bias=_detached(key.bias),
            value_bias=_detached(value.bias),
            output_bias=_detached(self.output.bias),
            query_norm=query_norm,
            key_norm=key_norm,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            # How fast pairs turn does not matter to grouping.
            inverse_frequencies=torch.zeros(self.pairs),
            scale=self.module.scaling,
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
                setattr(module, name, _linear(getattr(module, name), rows, bias))
            else:
                learn_average(getattr(module, name), grouped.groups, learned)
        _overwrite(getattr(module, self.query), weights.query, weights.query_bias)
        _overwrite(self.output, weights.output, weights.output_bias)
        self.tell(grouped.group_sizes)

    def make_room(self, group_sizes: Sequence[int]) -> None:
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
            self.module.num_key_value_groups = group_sizes[0]
            return
        # What repeats keys by a number must not find one.
        vars(self.module).pop("num_key_value_groups", None)
        self.module.kv_group_sizes = tuple(group_sizes)
        self.module.register_forward_pre_hook(_refuse_other_attention)


@dataclass(frozen=True)
class FusedSite(Site):
    """A layer of timm, with one projection for queries, keys and values."""

    def weights(self) -> GroupedAttentionWeights:
        """What the layer computes with; tensors are those of the module."""
        qkv = self.module.qkv
        query, key, value = qkv.weight.detach().chunk(3)
        biases = (None,) * 3 if qkv.bias is None else qkv.bias.detach().chunk(3)
        query_norm, key_norm = (_norm(self.module, name) for name in NORMS)
        return GroupedAttentionWeights(
            query=query,
            key=key,
            value=value,
            output=self.output.weight.detach(),
            query_bias=biases[0],
            key_bias=biases[1],
            value_bias=biases[2],
            output_bias=_detached(self.output.bias),
            query_norm=query_norm,
            key_norm=key_norm,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            inverse_frequencies=torch.zeros(0),
            scale=self.module.scale,
        )

    def replace(self, root: nn.Module, grouped: GroupedLayer, learned: str | None) -> None:
        """Put a layer of ours in the place of the module; see :meth:`Site.replace`."""
        source, new, like = self.weights(), grouped.weights, self.module.qkv
        projections = {"q_proj": _linear(like, new.query, new.query_bias)}
        for name, kind in (("k_proj", "key"), ("v_proj", "value")):
            weights = source if learned else new
            rows, bias = getattr(weights, kind), getattr(weights, f"{kind}_bias")
            projections[name] = _linear(like, rows, bias)
            if learned:
                learn_average(projections[name], grouped.groups, learned)
        _overwrite(self.output, new.output, new.output_bias)
        layer = TimmGroupedAttention(
            self.module, grouped.head_map, o_proj=self.output, **projections
        )
        root.set_submodule(self.name, layer)


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


NORMS = ("q_norm", "k_norm")


def attention_sites(model: nn.Module) -> dict[str, Site]:
    """Every attention layer of ``model`` that can be read and replaced, by name.

    Raises:
        UnsupportedError: There is none, or one does more than this can express; all are named.
    """
    found, obstacles = {}, []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in SEPARATE:
            site, reasons = _separate(model, name, module)
        elif kind == "Attention" and type(module).__module__.startswith("timm."):
            site, reasons = _fused(name, module)
        else:
            continue
        found[name] = site
        obstacles += [f"{name}: {reason}" for reason in reasons]
    if not found:
        obstacles = [f"there is no attention layer of a known kind in {type(model).__name__}"]
    if obstacles:
        raise UnsupportedError("grouping heads", obstacles, f"Known are {', '.join(KNOWN)}.")
    return found


def _separate(model: nn.Module, name: str, module: nn.Module) -> tuple[Site | None, list[str]]:
    names = SEPARATE[type(module).__name__]
    if hasattr(module, "o_proj"):
        output = module.o_proj
    else:
        output = model.get_submodule(name.rpartition(".")[0]).output.dense
    parts = {**{each: getattr(module, each) for each in names}, "output projection": output}
    if reasons := _not_plain(parts):
        return None, reasons
    if hasattr(module, "kv_group_sizes"):
        return None, ["its groups are uneven already"]
    head_dim = getattr(module, "head_dim", None) or module.attention_head_size
    pairs = 0
    if "position_embeddings" in inspect.signature(type(module).forward).parameters:
        tables = [m.inv_freq for m in model.modules() if hasattr(m, "inv_freq")]
        if not tables:
            return None, ["its model has no rotary embedding"]
        pairs = len(tables[0])
    counts = (len(parts[each].weight) // head_dim for each in names[:2])
    return Site(name, module, *names, output, *counts, pairs), []


def _fused(name: str, module: nn.Module) -> tuple[FusedSite | None, list[str]]:
    reasons = _not_plain({"qkv": module.qkv, "proj": module.proj})
    if getattr(module, "gate", None) is not None:
        reasons.append("its output is gated")
    if not isinstance(getattr(module, "norm", None) or nn.Identity(), nn.Identity):
        reasons.append("its heads are normalised after attention")
    if module.attn_drop.p:
        reasons.append("it has dropout of attention weights")
    if reasons:
        return None, reasons
    counts = module.num_heads, module.num_heads
    return FusedSite(name, module, "qkv", "qkv", "qkv", module.proj, *counts), []


def _not_plain(parts: dict[str, nn.Module]) -> list[str]:
    return [
        f"{name} is a {type(part).__name__}, not a plain nn.Linear"
        for name, part in parts.items()
        if type(part) is not nn.Linear
    ]


def _refuse_other_attention(module: nn.Module, args: tuple) -> None:
    from efficient_attn.integrations.transformers import NAME, NAME_FOR_SOME_LAYERS

    given = module.config._attn_implementation
    if given not in (NAME, NAME_FOR_SOME_LAYERS):
        raise UnsupportedError(
            f"attention by {given!r}",
            ["query heads share keys in uneven groups, which it would take for even ones"],
            f'Use attn_implementation="{NAME}".',
        )


def _linear(like: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A projection with these weights that trains if ``like`` does."""
    made = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            parameter = nn.Parameter(tensor.clone(), like.weight.requires_grad)
            setattr(made, name, parameter)
    return made.train(like.training)


@torch.no_grad()
def _overwrite(projection: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    projection.weight.copy_(weight)
    if bias is not None:
        projection.bias.copy_(bias)


def _norm(module: nn.Module, name: str) -> Tensor | None:
    """The weight of a norm on heads, or what says that there is one."""
    norm = getattr(module, name, None)
    if norm is None or isinstance(norm, nn.Identity):
        return None
    weight = getattr(norm, "weight", None)
    return torch.ones(module.head_dim) if weight is None else weight.detach()


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
