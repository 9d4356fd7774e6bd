"""Checkpoints of timm's vision transformers, with grouped heads or without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.encoder_configs import timm_arguments
from efficient_attn.errors import ConversionError
from efficient_attn.integrations.attention_sites import attention_sites
from efficient_attn.layers.grouped import MAP_NAMES


def load_timm(
    path: str | Path, groups: Mapping[str, list[int]], dtype: torch.dtype | str = "auto"
) -> nn.Module:
    """The model of a folder in the layout of ``timm.models.save_for_hf``, in evaluation mode.

    Args:
        path: A folder with ``config.json`` and safetensors.
        groups: How many query heads each key head of a layer serves, by its name; none for a model
            as timm wrote it.
        dtype: Of the parameters; by default that of the checkpoint.

    Raises:
        ConversionError: timm is not there, or the tensors are not those of the model.
    """
    try:
        import timm
    except ImportError as error:
        raise ConversionError(
            f"loading this model needs timm ({error}): pip install timm."
        ) from error
    checkpoint = Checkpoint.open(path)
    name, arguments = timm_arguments(checkpoint.config)
    for key in ("num_classes", "global_pool"):
        if key in checkpoint.config:
            arguments = {key: checkpoint.config[key], **arguments}
    model = timm.create_model(name, pretrained=False, **arguments)
    make_room(model, groups)
    state = checkpoint.read(checkpoint.tensors)
    missing, unexpected = [], []
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConversionError(f"the tensors in {path} do not fit its model: {error}") from error
    # The map follows from the groups.
    missing = [name for name in missing if not name.endswith(MAP_NAMES)]
    if missing or unexpected:
        raise ConversionError(
            f"the tensors in {path} do not fit its model: {missing[:3]} are missing, and "
            f"{unexpected[:3]} are not of it."
        )
    kind = next(iter(state.values())).dtype if dtype == "auto" else dtype
    return model.to(kind).eval()


def make_room(model: nn.Module, groups: Mapping[str, list[int]]) -> None:
    """Give layers projections of the size of grouped ones, before weights are loaded."""
    sites = attention_sites(model) if groups else {}
    for name, sizes in groups.items():
        if name not in sites:
            raise ConversionError(f"config.json has groups for {name!r}, which is no layer.")
        if sum(sizes) != sites[name].num_heads:
            raise ConversionError(
                f"config.json: the groups {sizes} of {name} must hold {sites[name].num_heads} "
                "query heads."
            )
        sites[name].make_room(model, sizes)
