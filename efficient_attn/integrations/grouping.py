"""Fewer key and value heads for a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from efficient_attn.convert.gqa import GroupedLayer, InputMoments, group_layer
from efficient_attn.convert.gqa.learned import PER
from efficient_attn.integrations import switching
from efficient_attn.integrations.attention_sites import attention_sites
from efficient_attn.integrations.grouped_checkpoints import grouped_record, groups_of
from efficient_attn.integrations.site import Site
from efficient_attn.integrations.whole_site import WholeSite

LEARNED = "learned"


@dataclass(frozen=True)
class GroupedSite:
    """What became of one attention layer.

    Attributes:
        name: Its name in the model.
        kv_heads_before: Key and value heads that it had.
        groups: Which of them each that is left stands for.
        key_error: Share of the mean square of scores that is lost on the calibration data.
        value_error: The same of values, as they enter the output.
    """

    name: str
    kv_heads_before: int
    groups: tuple[tuple[int, ...], ...]
    key_error: float
    value_error: float


@dataclass(frozen=True)
class GroupingReport:
    """What became of every layer; prints as a table.

    Attributes:
        layers: In the order in which the model holds them.
    """

    layers: tuple[GroupedSite, ...]

    @property
    def cache_ratio(self) -> float:
        """Keys and values of a token that are left, over those before."""
        before = sum(layer.kv_heads_before for layer in self.layers)
        return sum(len(layer.groups) for layer in self.layers) / before

    def __str__(self) -> str:
        rows = [("layer", "heads", "groups", "scores lost", "values lost")]
        for layer in self.layers:
            groups = " ".join("+".join(map(str, group)) for group in layer.groups)
            heads = f"{layer.kv_heads_before} to {len(layer.groups)}"
            errors = (f"{error:.1%}" for error in (layer.key_error, layer.value_error))
            rows.append((layer.name, heads, groups, *errors))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def group_heads(
    model: nn.Module,
    num_kv_heads: int,
    *,
    partition: str | Sequence[int] = "searched-even",
    pooling: str = "fitted",
    calibration: Iterable[Mapping | Tensor] | Mapping[str, InputMoments] | None = None,
    layers: Iterable[str] | None = None,
    learned_per: str = "head",
    seed: int = 0,
) -> GroupingReport:
    """Let the key and value heads of each attention layer of ``model`` be shared, in place.

    Layers of transformers stay what they are, with smaller projections. Even groups run under every
    attention implementation; uneven ones switch the model to this package's, and refuse others. A
    causal model with even groups is saved and loaded by the stock class, as one with so many
    ``num_key_value_heads``; what else is saved, only
    :func:`~efficient_attn.integrations.grouped_checkpoints.load_grouped` loads. A layer of timm, or
    one of this package, is replaced by a :class:`~efficient_attn.layers.GroupedQueryAttention`.

    Args:
        model: Holds attention of Llama, Mistral, Mixtral, Qwen, BERT, RoBERTa, ViT, or of timm, or
            :class:`~efficient_attn.layers.GroupedQueryAttention` in even groups.
        num_kv_heads: How many key and value heads are to be left in each layer.
        partition: See :func:`efficient_attn.convert.gqa.group_layer`.
        pooling: The same; or ``"learned"``: averages with weights that further training is to find,
            until :func:`efficient_attn.convert.gqa.fold_averages` is called.
        calibration: Inputs of the model, each a mapping of keyword arguments or one tensor. Tokens
            that an ``attention_mask`` of two dimensions hides do not count. Or what
            :func:`calibrate` made of them. By default weights alone decide.
        layers: Names of the layers; by default all of a known kind.
        learned_per: With ``"learned"``, what has a weight: ``"head"``, ``"row"`` or ``"column"``.
        seed: Of the search for groups.

    Raises:
        UnsupportedError: There is no layer of a known kind, or one cannot be replaced.
        ValueError: A number of heads or a name does not fit. The model is as it was.
    """
    if learned_per not in PER:
        raise ValueError(f"learned_per is {learned_per!r}; accepted: {', '.join(map(repr, PER))}.")
    sites = attention_sites(model)
    chosen = list(sites) if layers is None else list(layers)
    unknown = [name for name in chosen if name not in sites]
    if unknown:
        raise ValueError(f"layers holds {unknown[0]!r}; accepted are {', '.join(sites)}.")
    moments = calibration or {}
    if not isinstance(moments, Mapping):
        moments = calibrate(model, calibration, chosen)
    options = {
        "partition": partition,
        "pooling": "mean" if pooling == LEARNED else pooling,
        "seed": seed,
    }
    grouped = {
        name: group_layer(sites[name].weights(), num_kv_heads, moments=moments.get(name), **options)
        for name in chosen
    }
    return replace_layers(model, sites, grouped, learned_per if pooling == LEARNED else None)


def replace_layers(
    model: nn.Module, sites: dict[str, Site], grouped: dict[str, GroupedLayer], learned: str | None
) -> GroupingReport:
    """Put grouped layers in place, and tell transformers.

    Args:
        model: The model.
        sites: All its layers.
        grouped: What some of them become.
        learned: See :meth:`efficient_attn.integrations.site.Site.replace`.
    """
    for name, layer in grouped.items():
        sites[name].replace(model, layer, learned)
    tell_transformers(model, sites, {name: layer.group_sizes for name, layer in grouped.items()})
    rows = (
        GroupedSite(
            name,
            sites[name].num_kv_heads,
            layer.groups,
            layer.key_error,
            layer.value_error,
        )
        for name, layer in grouped.items()
    )
    return GroupingReport(tuple(rows))


@torch.no_grad()
def calibrate(
    model: nn.Module, inputs: Iterable[Mapping | Tensor], layers: Iterable[str]
) -> dict[str, InputMoments]:
    """Moments of the tokens that enter each of ``layers`` while ``model`` runs on ``inputs``."""
    moments: dict[str, InputMoments] = {}
    seen: Tensor | None = None

    def count_in(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tokens = args[0] if args else kwargs["hidden_states"]
            if name not in moments:
                moments[name] = InputMoments(tokens.shape[-1])
            moments[name].add(tokens if seen is None else tokens[seen])

        return hook

    training = model.training
    with ExitStack() as stack:
        for name in layers:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(count_in(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(model.train, training)
        model.eval()
        for batch in inputs:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            seen = mask.bool() if mask is not None and mask.dim() == 2 else None
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    if not moments:
        raise ValueError("calibration is empty; pass at least one input of the model, or None.")
    return moments


def tell_transformers(
    model: nn.Module, sites: Mapping[str, Site], sizes: Mapping[str, list[int]]
) -> None:
    """Write into configurations what was done, and switch uneven layers to our attention.

    Args:
        model: The model.
        sites: All its layers.
        sizes: How many query heads each key head serves, of the layers that were changed.
    """
    ours = {name: each for name, each in sizes.items() if not isinstance(sites[name], WholeSite)}
    if not ours:
        return
    even = all(len(set(each)) == 1 for each in ours.values())
    counts = {len(each) for each in ours.values()}
    configs = {id(sites[name].module.config): sites[name].module.config for name in ours}
    for config in configs.values():
        all_of_it = {name for name, site in sites.items() if site.module.config is config}
        stock = even and len(counts) == 1 and ours.keys() >= all_of_it
        if stock and hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = next(iter(counts))
        elif any(len(each) < sites[name].num_heads for name, each in ours.items()):
            stock = False
    if len(configs) == 1 and isinstance(model, PreTrainedModel):
        if stock:
            vars(model.config).pop("efficient_attn", None)
        else:
            # The old number of heads stays, with which no stock class loads the new weights.
            groups = {**groups_of(model.config.to_dict()), **ours}
            model.config.efficient_attn = grouped_record(groups)
    if not even:
        switching.switch_models(model, switching.EXACT.whole)
