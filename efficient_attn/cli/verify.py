"""``efficient-attn verify``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from efficient_attn.cli._converting import hold_to_bounds, verified, write_report


def verify(
    src: Annotated[Path, typer.Argument(help="Folder of the source.")],
    dst: Annotated[Path, typer.Argument(help="Folder of the converted model.")],
    text: Annotated[Path, typer.Option(help="A text to compare them on.")],
    text_tokens: Annotated[int, typer.Option(help="Tokens of it to use.", min=2)] = 16384,
    verify: Annotated[
        str, typer.Option(help="quick, or full, which adds long positions.")
    ] = "quick",
    max_kl: Annotated[
        float | None, typer.Option(help="Fail if the mean KL divergence is above this.")
    ] = None,
    max_ppl_ratio: Annotated[
        float | None, typer.Option(help="Fail if perplexity grows by more than this.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Compare a converted model with its source: logits, perplexity, tokens, cache."""
    start = time.perf_counter()
    found = verified(src, dst, text, text_tokens, verify)
    write_report(report, None, found, text, {"verifying": time.perf_counter() - start})
    hold_to_bounds(found, max_kl, max_ppl_ratio)
