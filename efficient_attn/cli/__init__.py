"""The ``efficient-attn`` command, one verb per file."""

from __future__ import annotations

import typer

from efficient_attn.cli import convert
from efficient_attn.cli.demo import demo
from efficient_attn.cli.info import info
from efficient_attn.cli.inspect import inspect
from efficient_attn.cli.plan import plan
from efficient_attn.cli.verify import verify

app = typer.Typer(
    help="Efficient transformer attention for any head map.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(info)
app.command()(demo)
app.command()(inspect)
app.add_typer(convert.app, name="convert")
app.command()(verify)
app.command()(plan)
