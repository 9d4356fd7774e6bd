"""Checkpoints with grouped heads that no stock class can read, under the model classes they have.

Their ``config.json`` says how many query heads each key head of a layer serves::

    "efficient_attn": {"format": 1, "groups": {"model.layers.0.self_attn": [5, 2, 1], ...}}

and has the number of heads that the source had, so that a stock class finds that the weights have
the wrong shape rather than reading them wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.encoder_configs import kind_of
from efficient_attn.convert.encoder_families import TIMM
from efficient_attn.convert.native import FORMAT
from efficient_attn.convert.to_gqa import grouped_record
from efficient_attn.errors import ConversionError
from efficient_attn.integrations.timm_checkpoints import load_timm, make_room
from efficient_attn.integrations.transformers import NAME

__all__ = ["grouped_record", "groups_of", "load_grouped"]


def groups_of(config: Mapping[str, object]) -> dict[str, list[int]]:
    """Group sizes by the name of a layer, as a configuration has them; empty if it has none.

    Raises:
        ConversionError: What is there are no group sizes.
    """
    record = config.get("efficient_attn") or {}
    groups = record.get("groups", {}) if isinstance(record, Mapping) else None
    if not isinstance(groups, Mapping) or not all(
        isinstance(sizes, list) and sizes and all(type(n) is int and n > 0 for n in sizes)
        for sizes in groups.values()
    ):
        raise ConversionError(
            "config.json: groups of efficient_attn must give each layer a list of whole numbers, "
            "how many query heads each key head serves."
        )
    if groups and record.get("format") != FORMAT:
        raise ConversionError(
            f"the checkpoint is in format {record.get('format')}; this version reads {FORMAT}."
        )
    return dict(groups)


def load_grouped(
    path: str | Path, *, dtype: torch.dtype | str = "auto", **kwargs: object
) -> PreTrainedModel | nn.Module:
    """A saved model whose heads were grouped, as its own class.

    Args:
        path: A folder with ``config.json`` and safetensors, of transformers or of timm.
        dtype: Of the parameters; by default that of the checkpoint.
        kwargs: For ``from_pretrained`` of transformers, for example ``device_map``.

    Raises:
        ConversionError: The checkpoint has no groups, or not the tensors that they ask for.
    """
    checkpoint = Checkpoint.open(path)
    groups = groups_of(checkpoint.config)
    if not groups:
        raise ConversionError(
            f"{path} says nothing of groups in its config.json; load it as any other model."
        )
    if kind_of(checkpoint.config) == TIMM:
        return load_timm(path, groups, dtype)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    names = config.architectures or [None]
    stock = getattr(transformers, str(names[0]), None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise ConversionError(
            f"config.json names the class {names[0]!r}, which transformers does not have."
        )
    try:
        model, info = _with_groups(stock, groups).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=NAME,
            output_loading_info=True,
            **kwargs,
        )
    except RuntimeError as error:
        raise ConversionError(f"the tensors in {path} do not fit its groups: {error}") from error
    problems = {kind: sorted(map(str, found)) for kind, found in info.items() if found}
    if problems:
        raise ConversionError(f"the tensors in {path} do not fit its groups: {problems}.")
    return model


def _with_groups(
    stock: type[PreTrainedModel], groups: Mapping[str, list[int]]
) -> type[PreTrainedModel]:
    """The stock class, whose instances have room for grouped heads before weights are loaded."""

    def __init__(self, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        stock.__init__(self, config, *args, **kwargs)
        make_room(self, groups)

    # The stock name, which save_pretrained writes down; and its module, by which transformers knows
    # its own classes, and so that older names of their tensors mean the same.
    own = {"__init__": __init__, "__module__": stock.__module__}
    return type(stock.__name__, (stock,), own)
