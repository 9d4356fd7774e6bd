"""Tables and the figure of what shared heads cost trained models."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# The measure of each kind of model: its key, the heading, and how it is written.
MEASURES = {
    "pooled_cosine": ("cosine to the source", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
}
COLORS = {
    "mean": "black",
    "first": "#9a9a9a",
    "norm": "#7d5ba6",
    "aligned": "#e08e45",
    "svd": "#4281a4",
    "fitted": "#0b6e4f",
    "learned": "#c1666b",
}
LINES = {"consecutive": "--", "searched-even": "-"}


def grouping_rows(records: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """A heading and rows, the first of which names the columns, for each table."""
    return [*_untrained(records), *_trained(records)]


def grouping_figure(records: list[dict]) -> plt.Figure | None:
    """Similarity of embeddings over heads left, for neighbours and for searched groups."""
    found = [r for r in records if r["kind"] == "grouping" and "pooled_cosine" in r]
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for partition, line in LINES.items():
        for pooling, color in COLORS.items():
            points = sorted(
                (r["heads"], r["pooled_cosine"])
                for r in found
                if (r["pooling"], r["calibrated"]) == (pooling, True)
                and (r["partition"] == partition or r["heads"] == 1)
            )
            if points:
                label = pooling if partition == "consecutive" else None
                axes.plot(*zip(*points, strict=True), line, color=color, marker=".", label=label)
    heads = sorted({r["heads"] for r in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(heads, map(str, heads))
    axes.minorticks_off()
    axes.set_title(
        f"{found[0]['model']}: groups searched (solid), neighbours (dashed)",
        fontsize=9,
        loc="left",
    )
    axes.set_xlabel(f"key and value heads left of {found[0]['of_heads']}", fontsize=8)
    axes.set_ylabel("cosine of pooled embeddings to the source", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    return figure


def _untrained(records: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """A row for each rule and a column for each number of heads."""
    tables = []
    for model in dict.fromkeys(r["model"] for r in records if r["kind"] == "grouping"):
        found = [r for r in records if r["kind"] == "grouping" and r["model"] == model]
        key = next(key for key in MEASURES if key in found[0])
        label, form = MEASURES[key]
        counts = sorted({r["heads"] for r in found if r["pooling"]}, reverse=True)
        rules = dict.fromkeys(
            (r["partition"], r["pooling"], r["calibrated"])
            for r in sorted(found, key=lambda r: not r["calibrated"])
            if r["pooling"]
        )
        values = {(r["partition"], r["pooling"], r["calibrated"], r["heads"]): r for r in found}
        choose = min if key == "perplexity" else max
        best = {count: choose(r[key] for r in found if r["heads"] == count) for count in counts}
        rows = [("groups", "shared head", "text", *map(str, counts))]
        for rule in rules:
            cells = []
            for count in counts:
                record = values.get((*rule, count))
                text = "" if record is None else form.format(record[key])
                marked = record is not None and record[key] == best[count]
                cells.append(f"**{text}**" if marked else text)
            rows.append((*rule[:2], "yes" if rule[2] else "no", *cells))
        source = form.format(found[0][key])
        heading = f"{model}, {label} by heads left of {found[0]['of_heads']} (source: {source})"
        tables.append((heading, rows))
    return tables


def _trained(records: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Before and after further training, by rule."""
    found = [r for r in records if r["kind"] == "uptrained"]
    if not found:
        return []
    rows = [("heads", "shared head", "teacher", "tokens", "perplexity before", "after")]
    for r in found:
        numbers = (f"{r[key]:.2f}" for key in ("perplexity_before", "perplexity_after"))
        start = str(r["heads"]), r["pooling"] or "source", f"{r['distill']:g}"
        rows.append((*start, f"{r['trained_tokens']:,}", *numbers))
    return [(f"{found[0]['model']}, after further training", rows)]
