"""Which attention function the layers of a transformers model call, and how to change that.

A layer looks the function up under the name that its configuration holds, and the model makes the
masks for the name in its own. So a whole model is switched by one name, while single layers get a
configuration of their own and keep the masks that the model makes for the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from efficient_attn.config import HyperConfig
from efficient_attn.integrations import hyper, model_facts
from efficient_attn.integrations.transformers import NAME, NAME_FOR_SOME_LAYERS

Undo = Callable[[], None]


class Names(NamedTuple):
    """Where a function is registered for whole models, and for layers alone."""

    whole: str
    alone: str


EXACT = Names(NAME, NAME_FOR_SOME_LAYERS)
HYPER = Names(hyper.NAME, hyper.NAME_FOR_SOME_LAYERS)


def uses_the_interface(module: nn.Module) -> bool:
    """Whether ``module`` looks its attention function up in the registry of transformers."""
    has_config = isinstance(getattr(module, "config", None), PreTrainedConfig)
    return has_config and model_facts.uses_the_interface(type(module))


def implementation(module: nn.Module) -> str:
    """The name under which ``module`` looks its attention function up."""
    return module.config._attn_implementation


def is_patched(module: nn.Module) -> bool:
    """Whether ``module`` calls a function of this package."""
    return implementation(module) in (*EXACT, *HYPER)


def switch_models(root: nn.Module, name: str) -> Undo:
    """Switch every transformers model in ``root`` to the function ``name``, masks included.

    Two models made from one configuration object share it, and a name written there would reach
    both. So the models in ``root`` get copies, which they keep after an undo.
    """
    configs = _own_configs(root)
    before = [(config, config._attn_implementation) for config in configs]
    for model in _outermost_models(root):
        model.set_attn_implementation(name)

    def undo() -> None:
        for config, name_before in before:
            # The public setter would write to nested configurations too.
            config._attn_implementation_internal = name_before

    return undo


def switch_layer(module: nn.Module, name: str) -> Undo:
    """Switch one attention layer of a model whose masks are made for ``sdpa`` or ``eager``."""
    before = module.config
    module.config = copy.copy(before)
    module.config._attn_implementation_internal = name

    def undo() -> None:
        module.config = before

    return undo


def obstacle_to_switching_alone(module: nn.Module) -> str | None:
    """Why ``module`` cannot be switched while its neighbours are not, or None."""
    name = implementation(module)
    if name in ("sdpa", "eager"):
        return None
    return (
        f"its model makes masks for {name!r}, which only {name!r} reads; "
        'call model.set_attn_implementation("sdpa") first'
    )


def obstacle_to_estimating(module: nn.Module) -> str | None:
    """Why the attention of ``module`` is not to be estimated, or None."""
    window = model_facts.sliding_window(module)
    if window is None:
        return None
    return f"it has a sliding window of {window} tokens, which is exact and cheap already"


def choose(
    module: nn.Module, config: HyperConfig, seed: int, layer: int
) -> tuple[hyper.Choice, Undo]:
    """Say how a layer estimates its attention, once it is switched to that."""
    return hyper.choose(module, config, seed, layer), lambda: hyper.forget(module)


def describe(module: nn.Module) -> str:
    """What ``module`` calls now, for the report."""
    dropout = _attention_dropout(module)
    warning = f"; its dropout of {dropout} is refused in training" if dropout else ""
    return f"was {implementation(module)}{warning}"


def _attention_dropout(module: nn.Module) -> float:
    for name in ("attention_dropout", "dropout", "dropout_p", "attn_dropout"):
        dropout = getattr(module, name, None)
        dropout = getattr(dropout, "p", dropout)
        if isinstance(dropout, float):
            return dropout
    return 0.0


def _outermost_models(root: nn.Module) -> list[PreTrainedModel]:
    if isinstance(root, PreTrainedModel):
        return [root]
    return [model for child in root.children() for model in _outermost_models(child)]


def _own_configs(root: nn.Module) -> list[PreTrainedConfig]:
    """Replace every configuration in ``root`` by a copy, and list the copies."""
    memo: dict = {}
    copies: dict[int, PreTrainedConfig] = {}

    def collect(config: PreTrainedConfig) -> None:
        copies[id(config)] = config
        for name in config.sub_configs:
            if getattr(config, name, None) is not None:
                collect(getattr(config, name))

    for module in root.modules():
        for name, held in list(vars(module).items()):
            if isinstance(held, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(held, memo))
                collect(getattr(module, name))
    return list(copies.values())
