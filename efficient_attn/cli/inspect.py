"""``efficient-attn inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from efficient_attn.cli._converting import errors_in_one_line

if TYPE_CHECKING:
    from efficient_attn.convert.source import Source


def inspect(
    src: Annotated[Path, typer.Argument(help="Folder of a model.")],
) -> None:
    """Check a checkpoint, and show its attention and what it can become; no weight is read.

    Of a converted one, the report of its conversion is shown.
    """
    from efficient_attn.convert.checkpoint import Checkpoint
    from efficient_attn.convert.pipeline import report_in
    from efficient_attn.convert.source import Source
    from efficient_attn.convert.to_mla import verdicts
    from efficient_attn.errors import ConversionError

    console = Console()
    with errors_in_one_line():
        checkpoint = Checkpoint.open(src)
        report = report_in(src)
        if report is not None:
            console.print(Markdown(report.markdown()))
        try:
            source = Source.open(checkpoint)
        except ConversionError:
            if report is None:
                raise
            return  # what it was converted to cannot be converted further
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
