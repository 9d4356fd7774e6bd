"""How near each result comes to what its device can do: operations over bytes, under the roofs.

The roofs are those of the run that gave the result: the bandwidth of reading and of copying, and
the matrix product of the dtype. Estimates and selected values are left out, since most of the
operations that they are counted with are not done at all.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.report import environment_of, first, ratios

COLUMNS = 2
OURS, THEIRS, ROOF = "#0b6e4f", "#c1666b", "#333333"
# What is computed, and how it is marked.
MARKERS = {
    "forward": "o",
    "forward and backward": "s",
    "cache": "^",
    "latent cache": "D",
}


class Point(NamedTuple):
    """A result: operations per byte, operations per second, what it computes, whether it is ours.

    Bytes are those that must be moved at least: inputs and outputs once, or the cache.
    """

    intensity: float
    flops_per_second: float
    what: str
    ours: bool


class Panel(NamedTuple):
    """The results of one run in one dtype, and its roofs in bytes and operations per second."""

    dtype: str
    read: float
    copy: float
    matmul: float
    points: list[Point]


def panels(records: list[dict]) -> list[Panel]:
    """One for each dtype of a file that has ceilings: ours, and the fastest of torch beside it."""
    ceilings = first(records, "ceilings")
    timed = {
        (r["workload"]["name"], r["provider"]): r
        for r in records
        if r["kind"] == "result" and r["status"] == "timed"
    }
    best_read = [r["bytes_per_second"] for r in timed.values() if r["side"] == "ceiling"]
    best_read.append(ceilings.get("read_bytes_per_second", 0.0))
    by_dtype: dict[str, list[Point]] = {}
    for ratio in ratios(records):
        for provider in (ratio.ours, ratio.baseline):
            record = timed[ratio.workload, provider]
            workload = record["workload"]
            if workload.get("op") == "hyper" or workload.get("top_values") is not None:
                continue
            point = Point(
                workload["flops"] / workload["minimal_bytes"],
                record["flops_per_second"],
                _what(workload),
                provider == ratio.ours,
            )
            by_dtype.setdefault(workload["dtype"], []).append(point)
    matmul = ceilings.get("matmul_flops_per_second", {})
    copy = ceilings.get("copy_bytes_per_second", 0.0)
    return [
        Panel(dtype, max(best_read), copy, matmul[dtype], points)
        for dtype, points in sorted(by_dtype.items())
        if dtype in matmul and max(copy, *best_read) > 0
    ]


def roofline_figure(files: list[list[dict]]) -> plt.Figure | None:
    """Every panel of some files of one kind of device; ``None`` where there is nothing to show."""
    shown = [(panel, environment_of(records)) for records in files for panel in panels(records)]
    if not shown:
        return None
    rows, columns = math.ceil(len(shown) / COLUMNS), min(len(shown), COLUMNS)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.4 * rows), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    intensities = [point.intensity for panel, _ in shown for point in panel.points]
    edges = (min(intensities) / 2, max(intensities) * 2)
    labels = {}
    for axes, (panel, environment) in zip(grid.flat, shown, strict=False):
        _draw(axes, panel, edges)
        commit = f", commit {environment['commit']}" if environment else ""
        axes.set_title(f"{panel.dtype}{commit}", fontsize=8, loc="left")
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        labels.values(), labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False
    )
    for axes in grid[-1]:
        axes.set_xlabel("FLOP for each byte that must be moved", fontsize=8)
    figure.supylabel("GFLOP/s", fontsize=9)
    environment = shown[0][1]
    if environment:
        figure.suptitle(f"{environment['device']}, torch {environment['torch']}", fontsize=10)
    return figure


def draw_rooflines(files: list[list[dict]], folder: Path) -> list[Path]:
    """Write ``roofline-KIND.png`` for each kind of device that there is something for."""
    written = []
    for kind, of_kind in by_kind(files).items():
        figure = roofline_figure(of_kind)
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"roofline-{kind}.png"
            figure.savefig(path, dpi=150, bbox_inches="tight")
            plt.close(figure)
            written.append(path)
    return written


def by_kind(files: list[list[dict]]) -> dict[str, list[list[dict]]]:
    """The files of each kind of device, ``"cpu"`` or ``"cuda"``."""
    kinds: dict[str, list[list[dict]]] = {"cpu": [], "cuda": []}
    for records in files:
        kinds[environment_of(records).get("device_kind", "cpu")].append(records)
    return kinds


def _draw(axes: Axes, panel: Panel, edges: tuple[float, float]) -> None:
    said = []
    for speed, style, name in ((panel.read, "-", "reading"), (panel.copy, ":", "copying")):
        if speed > 0:
            ridge = min(max(panel.matmul / speed, edges[0]), edges[1])
            xs = (edges[0], ridge, edges[1])
            ys = [min(panel.matmul, x * speed) / 1e9 for x in xs]
            axes.plot(xs, ys, style, color=ROOF, linewidth=1, label=f"roof by {name}")
            said.append(f"{name} {speed / 1e9:.3g} GB/s")
    said.append(f"matrix product {panel.matmul / 1e9:.3g} GFLOP/s")
    axes.text(0.98, 0.03, "\n".join(said), transform=axes.transAxes, ha="right", fontsize=7)
    for what, marker in MARKERS.items():
        for ours, color in ((True, OURS), (False, THEIRS)):
            points = [p for p in panel.points if (p.what, p.ours) == (what, ours)]
            if points:
                axes.scatter(
                    [p.intensity for p in points],
                    [p.flops_per_second / 1e9 for p in points],
                    s=18,
                    marker=marker,
                    facecolors=color if ours else "none",
                    edgecolors=color,
                    linewidths=0.9,
                    zorder=3 if ours else 2,
                    label=f"{'ours' if ours else 'fastest of torch'}, {what}",
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(edges)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _what(workload: dict) -> str:
    if workload.get("op") == "mla_decode":
        return "latent cache"
    if workload.get("op") == "decode":
        return "cache"
    return "forward and backward" if "backward" in workload["mode"] else "forward"
