"""Replacing ``torch.nn.MultiheadAttention`` where it stands."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from efficient_attn.layers import MultiheadAttention


def swap(root: nn.Module, module: nn.MultiheadAttention) -> Callable[[], None]:
    """Give ``module``, which ``root`` holds, the forward of our layer; returns how to undo it.

    The two classes differ in nothing else, so the object keeps its parameters, hooks and place.
    """
    module.__class__ = MultiheadAttention
    changed = [
        *_set(_layers_around(root, module), "activation_relu_or_gelu", 0),
        *_set(_encoders_around(root, module), "use_nested_tensor", False),
    ]

    def undo() -> None:
        module.__class__ = nn.MultiheadAttention
        for owner, name, value in changed:
            setattr(owner, name, value)

    return undo


# In evaluation, torch's encoder layers run a fused kernel instead of their attention module, and
# its encoders hand them nested tensors. Each of these attributes stands only for that.


def _layers_around(root: nn.Module, module: nn.Module) -> list[nn.Module]:
    return [
        layer
        for layer in root.modules()
        if isinstance(layer, nn.TransformerEncoderLayer) and layer.self_attn is module
    ]


def _encoders_around(root: nn.Module, module: nn.Module) -> list[nn.Module]:
    return [
        encoder
        for encoder in root.modules()
        if isinstance(encoder, nn.TransformerEncoder) and module in encoder.modules()
    ]


def _set(owners: list[nn.Module], name: str, value: object) -> list[tuple[nn.Module, str, object]]:
    before = [(owner, name, getattr(owner, name)) for owner in owners if hasattr(owner, name)]
    for owner, _, _ in before:
        setattr(owner, name, value)
    return before
