"""Figures of a results file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.conversion_report import conversion_figure
from bench.diffqkv_report import diffqkv_figure
from bench.grouping_report import grouping_figure
from bench.quality_report import quality_figure
from bench.recovery_report import recovery_figure
from bench.report import environment_of, ratios
from bench.roofline import roofline_figure
from bench.workloads import length_label

OURS, THEIRS = "#0b6e4f", "#9a9a9a"
COLUMNS = 3
# A color for what computes, a line for what is done about shared heads.
COLORS = {
    "efficient_attn": OURS,
    "flash": "#c1666b",
    "cudnn": "#4281a4",
    "efficient": "#e08e45",
    "math": "#7d5ba6",
    "flex": "#b3a125",
    "bmm": "#b5651d",
    "eager": THEIRS,
    "authors": "#333333",
    "read": "#000000",
}
LINES = {"gather": "--", "groups": ":", "keys": "--", "packed": "-.", "read": ":"}


def draw(records: list[dict], folder: Path) -> list[Path]:
    """Write those of the figures below that there is something for, as ``NAME.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "ratio": _ratio_figure,
        "time": _time_figure,
        "bandwidth": _bandwidth_figure,
        "memory": _memory_figure,
        "speedup": _speedup_figure,
        "roofline": lambda records: roofline_figure([records]),
        "quality": quality_figure,
        "conversion": conversion_figure,
        "grouping": grouping_figure,
        "recovery": recovery_figure,
        "diffqkv": diffqkv_figure,
    }
    written = []
    for name, make in figures.items():
        figure = make(records)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150, bbox_inches="tight")
            plt.close(figure)
            written.append(path)
    return written


def _ratio_figure(records: list[dict]) -> plt.Figure | None:
    found = ratios(records)
    if not found:
        return None
    figure, axes = _bars(len(found))
    values = [ratio.value for ratio in found]
    errors = [
        [max(0.0, r.value - r.low) for r in found],
        [max(0.0, r.high - r.value) for r in found],
    ]
    colors = [OURS if value >= 1 else THEIRS for value in values]
    axes.barh(range(len(found)), values, color=colors, xerr=errors, ecolor="#555555", height=0.7)
    axes.axvline(1, color="black", linewidth=0.8)
    for row, ratio in enumerate(found):
        axes.text(
            ratio.high, row, f"  {ratio.value:.2f}x {ratio.baseline}", va="center", fontsize=7
        )
    axes.set_xlim(0, max(ratio.high for ratio in found) * 1.35)
    _finish(axes, [ratio.workload for ratio in found], "times as fast as the fastest of torch")
    axes.set_title(_title(records), fontsize=9, loc="left")
    return figure


def _memory_figure(records: list[dict]) -> plt.Figure | None:
    names = [ratio.workload for ratio in ratios(records)]
    if not names:
        return None
    baseline = {ratio.workload: ratio.baseline for ratio in ratios(records)}
    timed = {(r["workload"]["name"], r["provider"]): r for r in _timed(records)}
    ours = {ratio.workload: ratio.ours for ratio in ratios(records)}
    figure, axes = _bars(len(names))
    for providers, color, shift, label in (
        (ours, OURS, -0.2, "efficient_attn"),
        (baseline, THEIRS, 0.2, "fastest of torch"),
    ):
        values = [
            timed[name, providers[name]]["memory"]["workspace_in_expanded_keys"] for name in names
        ]
        places = [row + shift for row in range(len(names))]
        axes.barh(places, values, color=color, height=0.38, label=label)
    axes.legend(fontsize=8, frameon=False)
    label = "memory beyond inputs and results, in units of K written out per query head"
    _finish(axes, names, label)
    axes.set_title(_title(records), fontsize=9, loc="left")
    return figure


def _speedup_figure(records: list[dict]) -> plt.Figure | None:
    """How estimates gain with the length, whatever the number of heads."""
    kinds = {r["workload"]["name"]: r["workload"] for r in _timed(records)}
    lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for ratio in ratios(records):
        workload = kinds[ratio.workload]
        if workload.get("op") == "hyper":
            mask = "causal" if workload["causal"] else "full"
            passes = "forward and backward" if "backward" in workload["mode"] else "forward"
            line = lines.setdefault((passes, mask, workload["hyper"]), [])
            line.append((ratio.num_keys, ratio.value))
    if not lines:
        return None
    figure, grid = plt.subplots(
        1, 2, figsize=(8.4, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    lengths = sorted({length for line in lines.values() for length, _ in line})
    for axes, passes in zip(grid.flat, ("forward", "forward and backward"), strict=True):
        for (of, mask, config), line in sorted(lines.items()):
            if of == passes:
                style = {"color": OURS if mask == "full" else "#c1666b", "marker": "o"}
                style |= {"markersize": 3, "linestyle": "-" if config == "paper" else "--"}
                axes.plot(*zip(*sorted(line), strict=True), label=f"{config}, {mask}", **style)
        axes.axhline(1, color="black", linewidth=0.8)
        _log_axes(axes, lengths)
        axes.set_title(passes, fontsize=8, loc="left")
        if any(of == passes for of, _, _ in lines):
            axes.legend(fontsize=7, frameon=False)
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("times as fast as exact attention", fontsize=9)
    figure.suptitle(_title(records), fontsize=10)
    return figure


def _time_figure(records: list[dict]) -> plt.Figure | None:
    attention = [r for r in _timed(records) if not _reads_a_cache(r)]
    milliseconds = _curves(attention, lambda record: record["seconds"]["median"] * 1e3)
    return _curves_figure(milliseconds, "tokens", "milliseconds", _title(records))


def _bandwidth_figure(records: list[dict]) -> plt.Figure | None:
    cached = [r for r in _timed(records) if _reads_a_cache(r)]
    bandwidth = _curves(cached, lambda record: record["bytes_per_second"] / 1e9)
    label = "GB/s of the keys and values that some head reads"
    return _curves_figure(bandwidth, "cached tokens", label, _title(records))


def _reads_a_cache(record: dict) -> bool:
    return record["workload"].get("op", "attention") in ("decode", "mla_decode")


# Points of each provider, of each family of workloads.
Curves = dict[str, dict[str, list[tuple[int, float]]]]


def _curves(records: list[dict], value: Callable[[dict], float]) -> Curves:
    """Families that were timed at more than one length."""
    families: Curves = {}
    for record in records:
        curves = families.setdefault(record["workload"]["family"], {})
        point = (record["workload"]["num_keys"], value(record))
        curves.setdefault(record["provider"], []).append(point)
    return {
        name: curves
        for name, curves in families.items()
        if len({length for points in curves.values() for length, _ in points}) > 1
    }


def _curves_figure(families: Curves, x: str, y: str, title: str) -> plt.Figure | None:
    if not families:
        return None
    rows = math.ceil(len(families) / COLUMNS)
    figure, grid = plt.subplots(
        rows, COLUMNS, figsize=(4.2 * COLUMNS, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(families) :]:
        axes.set_visible(False)
    for axes, (family, curves) in zip(grid.flat, families.items(), strict=False):
        for provider, points in sorted(curves.items()):
            words = provider.removeprefix("sdpa-").split("-")
            ours = provider == "efficient_attn"
            axes.plot(
                *zip(*sorted(points), strict=True),
                marker="x" if "pad" in words else "o",
                markersize=3,
                linewidth=2.2 if ours else 1.2,
                linestyle=next((LINES[word] for word in words if word in LINES), "-"),
                color=COLORS.get(words[0], "#333333"),
                zorder=3 if ours else 2,
                label=provider,
            )
        _log_axes(axes, sorted({length for points in curves.values() for length, _ in points}))
        axes.set_title(family, fontsize=8, loc="left")
        axes.legend(fontsize=6, frameon=False)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _timed(records: list[dict]) -> list[dict]:
    return [r for r in records if r["kind"] == "result" and r["status"] == "timed"]


def _bars(count: int) -> tuple[plt.Figure, Axes]:
    return plt.subplots(figsize=(9, 1.2 + 0.3 * count), layout="constrained")


def _finish(axes: Axes, names: list[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _log_axes(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_label(round(x))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _title(records: list[dict]) -> str:
    environment = environment_of(records)
    if not environment:
        return ""
    return f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}"
