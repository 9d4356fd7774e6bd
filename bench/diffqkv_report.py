"""Tables and the figure of DiffQKV models: converted, and trained from scratch."""

from __future__ import annotations

import statistics

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def diffqkv_rows(records: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """A heading and rows, the first of which names the columns, for each table."""
    return [*_trained(records), *_converted(records)]


def diffqkv_figure(records: list[dict]) -> plt.Figure | None:
    """Test loss of every run over what its cache holds of a token."""
    runs = _runs(records)
    if not runs:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, found in runs.items():
        cache = [r["cache_numbers_per_token"] for r in found]
        style = {"marker": "o" if name.startswith("DiffQKV") else "s", "markersize": 5}
        axes.plot(cache, [r["test_loss"] for r in found], label=name, linestyle="", **style)
    axes.set_xscale("log", base=2)
    numbers = sorted({r["cache_numbers_per_token"] for found in runs.values() for r in found})
    axes.set_xticks(numbers, map(str, numbers), fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("cached numbers per token, all layers", fontsize=8)
    axes.set_ylabel("test loss, nats per token", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    return figure


def _runs(records: list[dict]) -> dict[str, list[dict]]:
    """The runs of each arrangement of heads that were trained longest."""
    found = [r for r in records if r["kind"] == "trained"]
    longest = max((r["steps"] for r in found), default=0)
    runs: dict[str, list[dict]] = {}
    for record in found:
        if record["steps"] == longest:
            runs.setdefault(record["variant"], []).append(record)
    return runs


def _trained(records: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    runs = _runs(records)
    if not runs:
        return []
    rows = [("heads", "cached numbers", "parameters", "runs", "test loss", "from", "to")]
    for name, found in runs.items():
        losses = [r["test_loss"] for r in found]
        rows.append(
            (
                name,
                str(found[0]["cache_numbers_per_token"]),
                f"{found[0]['parameters']:,}",
                str(len(found)),
                *(f"{x:.3f}" for x in (statistics.mean(losses), min(losses), max(losses))),
            )
        )
    tokens = next(iter(runs.values()))[0]["tokens"]
    return [(f"Trained from scratch on {tokens:,} tokens, nats per token of held-back files", rows)]


def _converted(records: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    found = [r for r in records if r["kind"] == "diffqkv"]
    if not found:
        return []
    source = next(r for r in found if not r["merge"])
    rows = [("key heads", "value heads", "bytes/token", "rule", "text", "perplexity", "more loss")]
    for r in found:
        if r is source:
            continue
        rows.append(
            (
                str(r["key_heads"]),
                str(r["value_heads"]),
                f"{r['bytes_per_token']['after']:,}",
                r["merge"],
                "yes" if r["calibrated"] else "no",
                f"{r['perplexity']:.2f}",
                f"{r['change']:.3f} ± {r['change_error']:.3f}",
            )
        )
    before = found[-1]["bytes_per_token"]["before"]
    heads = f"{source['key_heads']} key and {source['value_heads']} value heads"
    heading = (
        f"{source['model']}, {heads}, {before:,} bytes per token, "
        f"perplexity {source['perplexity']:.2f} before conversion"
    )
    return [(heading, rows)]
