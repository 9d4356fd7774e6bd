"""``efficient-attn verify``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from efficient_attn.cli._converting import (
    Bounds,
    fail,
    hold_to_bounds,
    text_or_images,
    verified,
    write_report,
)


def verify(
    src: Annotated[Path, typer.Argument(help="Folder of the source.")],
    dst: Annotated[Path, typer.Argument(help="Folder of the converted model.")],
    text: Annotated[Path | None, typer.Option(help="A text to compare them on.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="For a ViT: a folder of images, or an .npy file.")
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(help="Tokens of the text, or of the images, to use.", min=2)
    ] = 16384,
    verify: Annotated[
        str, typer.Option(help="quick, or full, which adds long positions.")
    ] = "quick",
    max_kl: Annotated[
        float | None, typer.Option(help="Fail if the mean KL divergence is above this.")
    ] = None,
    max_ppl_ratio: Annotated[
        float | None, typer.Option(help="Fail if perplexity grows by more than this.")
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="Fail if embeddings of an encoder are less alike.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Compare a converted model with its source: logits, perplexity, tokens, cache, embeddings."""
    given = text_or_images(text, images)
    if given is None:
        fail("pass --text FILE, or for a vision transformer --images FOLDER, to compare them on.")
    bounds = Bounds(given, text_tokens, max_kl, max_ppl_ratio, verify, min_cosine)
    bounds.check(src)
    start = time.perf_counter()
    found = verified(src, dst, bounds)
    write_report(report, None, found, given, {"verifying": time.perf_counter() - start})
    hold_to_bounds(found, bounds)
