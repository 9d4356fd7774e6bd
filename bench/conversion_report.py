"""Tables and the figure of what conversion to latent attention costs the example model."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# Columns of the first table and lines of the figure: variant, heading, color.
DRAWN = (
    ("default", "default", "#0b6e4f"),
    ("one table", "one table for all layers", "#4281a4"),
    ("a grid", "a plain rotary grid", "#e08e45"),
    ("TransMLA", "TransMLA at its best", "#9a9a9a"),
)

LABELS = {"default": ".. and the output on what heads bring behind converted layers: the default"}
# How levers are told, which are moved before the last step.
WITHOUT = "default without that last step, but"


def conversion_rows(records: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """A heading and rows, the first of which names the columns, for each table."""
    found = [r for r in records if r["kind"] == "conversion" and r["text"] == "held out"]
    if not found:
        return []
    original = next(r for r in found if r["variant"] == "original")
    budgets = {r["numbers"]: r["of_numbers"] for r in found if r["part"] == "budget"}
    by_name = {(r["variant"], r["numbers"]): r for r in found}
    names = [(v, heading) for v, heading, _ in DRAWN]
    rows = [("cached numbers", "share", *(h for _, h in names), "sizes: ours", "TransMLA")]
    for numbers, of in budgets.items():
        cells = [_cell(by_name.get((variant, numbers))) for variant, _ in names]
        sizes = [_sizes(by_name.get((variant, numbers))) for variant in ("default", "TransMLA")]
        rows.append((str(numbers), f"{numbers / of:.1%}", *cells, *sizes))
    heading = f"Perplexity on held-out text; {original['perplexity']:.2f} before conversion"
    tables = [(heading, rows)]
    moved = [r for r in found if r["part"] in ("ladder", "lever")]
    if moved:
        places = sorted({r["numbers"] for r in moved}, reverse=True)
        ladder, levers = (
            list(dict.fromkeys(r["variant"] for r in moved if r["part"] == part))
            for part in ("ladder", "lever")
        )
        rows = [("choices", *(f"{p} numbers" for p in places))]
        for name in (*ladder, "default", *levers):
            told = f"{WITHOUT} {name}" if name in levers else LABELS.get(name, name)
            rows.append((told, *(_cell(by_name.get((name, p))) for p in places)))
        tables.append(("Perplexity on held-out text, sizes as the default has them", rows))
    return tables


def conversion_figure(records: list[dict]) -> plt.Figure | None:
    """Perplexity over the size of the cache."""
    found = [r for r in records if r["kind"] == "conversion" and r["text"] == "held out"]
    if not found:
        return None
    original = next(r for r in found if r["variant"] == "original")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.axhline(original["perplexity"], color="black", lw=1, ls="--", label="before conversion")
    for variant, label, color in DRAWN:
        points = sorted(
            (r["numbers"], r["perplexity"])
            for r in found
            if r["variant"] == variant and r["part"] == "budget"
        )
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    numbers = sorted({r["numbers"] for r in found})
    axes.set_xticks(numbers, [str(n) for n in numbers], fontsize=7, minor=False)
    axes.set_xticks([], minor=True)
    ticks = [50, 60, 80, 100, 150, 200, 300]
    axes.set_yticks(ticks, [str(t) for t in ticks], fontsize=7)
    axes.set_yticks([], minor=True)
    axes.set_xlabel("cached numbers per token and layer", fontsize=8)
    axes.set_ylabel("perplexity, held-out text", fontsize=8)
    axes.set_title(original["model"], fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    return figure


def _cell(record: dict | None) -> str:
    if record is None:
        return ""
    told = f"{record['perplexity']:.2f}"
    return f"{told} (+{record['change']:.3f} ± {record['change_error']:.3f})".replace("+-", "-")


def _sizes(record: dict | None) -> str:
    if record is None:
        return ""
    told = f"{record['numbers'] - record['rope_dim']} + {record['rope_dim']}"
    return f"{told}, fold {record['fold']}" if "fold" in record else told
