"""What every conversion writes alike: the parts of a model that attention has no share in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from efficient_attn.convert.pipeline import Part
from efficient_attn.convert.source import Source


class Output:
    """The parts of a converted model that are those of its source, in another dtype perhaps.

    Args:
        source: What is converted.
        dtype: Of the output.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source = source
        self.dtype = dtype

    @property
    def dtype_name(self) -> str:
        """The dtype as configs spell it."""
        return str(self.dtype).removeprefix("torch.")

    def parts(self, layer: Callable[[int], Part]) -> dict[str, Callable[[], Part]]:
        """What computes each part of the output, in order, given what computes a layer."""
        layers = {f"layer {i}": partial(layer, i) for i in range(self.source.num_layers)}
        return {"embedding": self.embedding, **layers, "head": self.head}

    def embedding(self) -> Part:
        """What comes before the layers."""
        return self._others(self._embedding_names()), {}

    def head(self) -> Part:
        """What comes after them."""
        return self._others(self.source.outside_names()[self.source.family.before :]), {}

    def _embedding_names(self) -> list[str]:
        return self.source.outside_names()[: self.source.family.before]

    def _embedding_bytes(self) -> int:
        """Of the embedding, read and written."""
        tensors = self.source.checkpoint.tensors
        numbers = sum(tensors[name].numel for name in self._embedding_names())
        return numbers * (self.dtype.itemsize + self.source.dtype.itemsize)

    def _others(self, names: list[str]) -> dict[str, Tensor]:
        return {name: x.to(self.dtype) for name, x in self.source.checkpoint.read(names).items()}
