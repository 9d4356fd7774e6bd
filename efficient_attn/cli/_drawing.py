"""The figure beside a report."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

# What a conversion notes of a layer, and how the figure calls it.
LINES = {
    "output_error": "altogether",
    "rope_error": "by turning less",
    "rank_error": "by caching less",
}


def draw_layers(layers: Sequence[dict], path: Path) -> bool:
    """Relative change of each layer's output; whether there was something to draw, and with."""
    found = [layer for layer in layers if "output_error" in layer]
    if not found or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for key, label in LINES.items():
        if key in found[0]:
            axes.plot([layer[key] for layer in found], "o-", markersize=3, label=label)
    axes.set(xlabel="layer", ylabel="relative change of the output", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
