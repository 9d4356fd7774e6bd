"""``efficient-attn inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from efficient_attn.cli._converting import errors_in_one_line

if TYPE_CHECKING:
    from efficient_attn.convert.source import Source


def inspect(
    src: Annotated[Path, typer.Argument(help="Folder of a model.")],
) -> None:
    """Check a checkpoint, and show its attention and what it can become; no weight is read."""
    from efficient_attn.convert.pipeline import open_source
    from efficient_attn.convert.to_mla import verdicts

    with errors_in_one_line():
        source = open_source(src)
    console = Console()
    console.print(_facts(source))
    table = Table("conversion", "target", "possible without loss")
    if not source.family.causal:
        table.add_row("gqa", "native", "with as many heads")
    for target, reasons in verdicts(source).items() if source.family.causal else ():
        table.add_row("mla", target, "no: " + "; ".join(reasons) if reasons else "yes")
    console.print(table)


def _facts(source: Source) -> Table:
    config = source.config
    groups, dim = config["num_key_value_heads"], config["head_dim"]
    element = source.dtype.itemsize
    windows = sorted({str(source.window(i)) for i in range(source.num_layers)} - {"None"})
    biases = zip(("query", "key", "value", "output"), source.family.biases(config), strict=True)
    kept = "cached bytes per token"
    if not source.family.causal:
        kept = "keys and values, bytes per token"
    rows = {
        "family": config["model_type"],
        "layers": source.num_layers,
        "width": config["hidden_size"],
        "heads": f"{config['num_attention_heads']} query, {groups} key and value, of {dim}",
        "rotary": f"{source.rope['rope_type']}, base {source.rope['rope_theta']:g}"
        if source.rope
        else "none",
        "window": ", ".join(windows) or "none",
        "biases": ", ".join(name for name, there in biases if there) or "none",
        "norms on heads": "yes" if source.family.query_norm else "no",
        "dtype": str(source.dtype).removeprefix("torch."),
        "parameters": f"{source.parameters:,}",
        kept: f"{2 * groups * dim * element * source.num_layers:,}",
    }
    table = Table("", "", show_header=False)
    for name, fact in rows.items():
        table.add_row(name, str(fact))
    return table
