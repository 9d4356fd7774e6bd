"""Tables and the figure of what estimated attention costs trained models."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# The measure of each kind of model: its key, the heading, and how it is written.
MEASURES = {
    "pooled_cosine": (
        ("pooled_cosine", "cosine, pooled", "{:.3f}"),
        ("pooled_cosine_error", "±", "{:.3f}"),
        ("token_cosine", "cosine, by token", "{:.3f}"),
    ),
    "loss": (
        ("perplexity", "perplexity", "{:.2f}"),
        ("change", "added nats", "{:+.4f}"),
        ("change_error", "±", "{:.4f}"),
    ),
}
# Families in the figure; the rest are levers.
DRAWN = {
    "window": ("black", "--"),
    "published": ("#9a9a9a", "-"),
    "window, samples": ("#0b6e4f", "-"),
    "leaves, samples, no limit": ("#4281a4", "-"),
    "window, blocks": ("#e08e45", "-"),
    "window, blocks, samples": ("#c1666b", "-"),
}


def quality_rows(records: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """A heading and rows, the first of which names the columns, for each table."""
    tables = []
    for model, found in _by_model(records).items():
        measures = _measures(found)
        whole = [r for r in found if r["layers"] in (0, r["of_layers"])]
        depths = list(next((r["needle_share"] for r in whole if "needle_share" in r), {}))
        heads = ("attention", "b = m", "pairs per query", *(m[1] for m in measures))
        heads += tuple(f"needle at {float(depth):.0%}" for depth in depths)
        heads += ("needle error",) if depths else ()
        rows = [heads]
        for r in whole:
            needle = r.get("needle_share", {})
            errors = list(r.get("needle_error", {}).values())
            cells = [f"{needle[d]:.2f}" if needle else "" for d in depths]
            cells += [f"{sum(errors) / len(errors):.2f}" if errors else ""] if depths else []
            rows.append((*_start(r), *(form.format(r[key]) for key, _, form in measures), *cells))
        tables.append((f"{model}, every layer replaced", rows))
        parts = [r for r in found if _in_part(r, found)]
        if parts:
            rows = [("attention", "layers replaced", *(m[1] for m in measures))]
            for r in sorted(parts, key=lambda r: (r["variant"], r["layers"])):
                share = f"{r['layers']} of {r['of_layers']}"
                values = (form.format(r[key]) for key, _, form in measures)
                rows.append((r["variant"], share, *values))
            size = next(r["size"] for r in parts)
            tables.append((f"{model}, the last layers replaced, b = m = {size}", rows))
    return tables


def quality_figure(records: list[dict]) -> plt.Figure | None:
    """Quality over the number of pairs evaluated, a panel for each model."""
    models = _by_model(records)
    if not models:
        return None
    figure, grid = plt.subplots(
        1, len(models), figsize=(5 * len(models), 3.6), squeeze=False, layout="constrained"
    )
    for axes, (model, found) in zip(grid.flat, models.items(), strict=True):
        key, label, _ = _measures(found)[0 if "pooled_cosine" in found[0] else 1]
        for variant, (color, line) in DRAWN.items():
            points = sorted(
                (r["pairs"], r[key])
                for r in found
                if r["variant"] == variant and r["layers"] == r["of_layers"]
            )
            if points:
                axes.plot(*zip(*points, strict=True), line, color=color, marker="o", label=variant)
        axes.set_title(f"{model}, {found[0]['tokens']} tokens", fontsize=9, loc="left")
        axes.set_xlabel("pairs evaluated per query", fontsize=8)
        axes.set_ylabel(label, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    grid.flat[0].legend(fontsize=7, frameon=False)
    return figure


def _by_model(records: list[dict]) -> dict[str, list[dict]]:
    models: dict[str, list[dict]] = {}
    for record in records:
        if record["kind"] == "quality":
            models.setdefault(record["model"], []).append(record)
    return models


def _measures(found: list[dict]) -> tuple[tuple[str, str, str], ...]:
    return next(columns for key, columns in MEASURES.items() if key in found[0])


def _in_part(record: dict, found: list[dict]) -> bool:
    """Whether it tells of some layers, or is what those are to be compared with."""
    parts = [r for r in found if 0 < r["layers"] < r["of_layers"]]
    sizes, names = ({r[key] for r in parts} for key in ("size", "variant"))
    return record["size"] in sizes and record["variant"] in names


def _start(record: dict) -> tuple[str, str, str]:
    size = str(record["size"] or "")
    return record["variant"], size, f"{record['pairs']:.0f}"
