"""What the code of a transformers model says about the attention layers in it."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class ModelFacts(NamedTuple):
    """What the attention layers of a model know without a mask.

    Attributes:
        know_their_order: Each says whether it is causal. Where a model supports sdpa, flash or flex
            attention they must; elsewhere, some read their order off the mask alone.
        know_their_window: Each hands its sliding window over.
    """

    know_their_order: bool
    know_their_window: bool


def uses_the_interface(module_class: type) -> bool:
    """Whether modules of a class look their attention function up in transformers' registry."""
    code = getattr(inspect.unwrap(module_class.forward), "__code__", None)
    return code is not None and "get_interface" in code.co_names


def sliding_window(module: nn.Module) -> int | None:
    """The window that an attention layer hands over, its own or that of its whole model."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    if _hands_over_window(type(module)):
        return getattr(module.config, "sliding_window", None)
    return None


@functools.cache
def facts(config_class: type[PreTrainedConfig]) -> ModelFacts:
    """The facts of the models with this configuration; nothing is assumed where code is not found.

    transformers keeps ``configuration_x.py`` and ``modeling_x.py`` side by side, and so does the
    code that comes with a checkpoint.
    """
    modeling = sys.modules.get(config_class.__module__.replace("configuration_", "modeling_"))
    classes = (
        [
            member
            for member in vars(modeling).values()
            if inspect.isclass(member) and member.__module__ == modeling.__name__
        ]
        if modeling
        else []
    )
    models = [member for member in classes if issubclass(member, PreTrainedModel)]
    layers = [
        member for member in classes if issubclass(member, nn.Module) and uses_the_interface(member)
    ]
    return ModelFacts(
        any(m._supports_sdpa or m._supports_flash_attn or m._supports_flex_attn for m in models),
        bool(layers) and all(map(_hands_over_window, layers)),
    )


def _hands_over_window(layer: type[nn.Module]) -> bool:
    try:
        return "sliding_window=" in inspect.getsource(layer.forward)
    except OSError:
        return False
