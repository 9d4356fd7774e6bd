"""What a patch did to each attention layer of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerReport:
    """What became of one attention layer.

    Attributes:
        name: Its name in the model.
        kind: Its class.
        action: Whether this package computes its attention now.
        detail: What it used before, or why it was left as it was.
    """

    name: str
    kind: str
    action: Literal["replaced", "skipped"]
    detail: str


@dataclass(frozen=True)
class PatchReport:
    """What became of every attention layer of a model; prints as a table.

    Attributes:
        layers: In the order in which the model holds them.
    """

    layers: tuple[LayerReport, ...]

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the layers that were replaced."""
        return tuple(layer.name for layer in self.layers if layer.action == "replaced")

    @property
    def skipped(self) -> dict[str, str]:
        """Names of the layers that were left as they were, each with the reason."""
        return {layer.name: layer.detail for layer in self.layers if layer.action == "skipped"}

    def __str__(self) -> str:
        rows = [("layer", "class", "", "detail"), *_folded(self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        total = f"{len(self.replaced)} of {len(self.layers)} attention layers replaced"
        return "\n".join((*lines, total))


def _folded(layers: Iterable[LayerReport]) -> Iterator[tuple[str, str, str, str]]:
    """Table rows, neighbours that differ in nothing but one number being told together."""
    run: list[LayerReport] = []
    for layer in layers:
        if run and not _alike(run[-1], layer):
            yield _row(run)
            run = []
        run.append(layer)
    if run:
        yield _row(run)


def _alike(a: LayerReport, b: LayerReport) -> bool:
    return _pattern(a) == _pattern(b)


def _pattern(layer: LayerReport) -> tuple[str, ...]:
    return re.sub(r"\d+", "#", layer.name, count=1), layer.kind, layer.action, layer.detail


def _row(run: list[LayerReport]) -> tuple[str, str, str, str]:
    first, last = run[0], run[-1]
    name = first.name
    if len(run) > 1:
        ends = (re.search(r"\d+", layer.name).group() for layer in (first, last))
        name = re.sub(r"\d+", "-".join(ends), first.name, count=1)
    return name, first.kind, first.action, first.detail
