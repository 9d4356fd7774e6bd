"""The table and the figure of what training gives back after conversion to a smaller cache."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

HEADS = ("cached bytes per token", "share", "converted", "and trained", "tokens", "minutes")


def recovery_rows(records: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """A heading and rows, the first of which names the columns, if there is something to tell."""
    found = [r for r in records if r["kind"] == "recovery"]
    if not found:
        return []
    rows = [HEADS]
    for r in sorted(found, key=lambda r: -r["kv_ratio"]):
        share = f"{r['kv_ratio']:.1%}" if r["kv_ratio"] < 1 else "not converted"
        numbers = (f"{r[key]:.2f}" for key in ("perplexity_before", "perplexity_after"))
        trained = f"{r['trained_tokens']:,}", f"{r['minutes']:.1f}"
        rows.append((f"{r['bytes_per_token']:,}", share, *numbers, *trained))
    return [("Perplexity on held-out text, before and after recovery training", rows)]


def recovery_figure(records: list[dict]) -> plt.Figure | None:
    """Perplexity over the bytes that are cached, before and after training."""
    found = sorted(
        (r for r in records if r["kind"] == "recovery"), key=lambda r: r["bytes_per_token"]
    )
    if not found:
        return None
    *converted, source = found
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for key, label, color in (
        ("perplexity_before", "converted", "#4281a4"),
        ("perplexity_after", "converted, then trained", "#0b6e4f"),
    ):
        points = [(r["bytes_per_token"], r[key]) for r in converted]
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=label)
    axes.axhline(source["perplexity_before"], color="black", lw=1, ls="--", label="the source")
    axes.axhline(
        source["perplexity_after"], color="black", lw=1, ls=":", label="the source, trained as long"
    )
    held = [r["bytes_per_token"] for r in converted]
    axes.set_xscale("log", base=2)
    axes.set_xticks(held, [f"{n:,}" for n in held])
    axes.minorticks_off()
    axes.set_xlabel(f"cached bytes per token; {source['bytes_per_token']:,} before", fontsize=8)
    axes.set_ylabel("perplexity, held-out text", fontsize=8)
    title = f"{source['model']}, trained on {source['trained_tokens']:,} tokens"
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    return figure
