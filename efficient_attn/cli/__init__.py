"""The ``efficient-attn`` command, one verb per file."""

from __future__ import annotations

import typer

from efficient_attn.cli.demo import demo
from efficient_attn.cli.info import info
from efficient_attn.cli.plan import plan

app = typer.Typer(
    help="Efficient transformer attention for any head map.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(info)
app.command()(demo)
app.command()(plan)
