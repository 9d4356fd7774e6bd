"""``efficient-attn info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from efficient_attn import diagnostics


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, devices, and which kernel answers each op."""
    report = diagnostics.report()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console()
    console.print(_facts(report))
    console.print(_kernels(report["kernels"]))


def _facts(report: dict) -> Table:
    table = Table("", "", show_header=False)
    for name, version in report["versions"].items():
        table.add_row(name, version or "not installed")
    for name, fact in report["machine"].items():
        text = ", ".join(f"{k} {v}" for k, v in fact.items()) if isinstance(fact, dict) else fact
        table.add_row(name, "none" if text is None else str(text))
    return table


def _kernels(kernels: dict) -> Table:
    table = Table("op", "device", "asked in this order", "")
    for op, devices in kernels.items():
        for device, entries in devices.items():
            for i, entry in enumerate(entries):
                state = "answers" if entry["answers"] else f"no: {entry['reason']}"
                table.add_row(op if i == 0 else "", device if i == 0 else "", entry["name"], state)
        table.add_section()
    return table
