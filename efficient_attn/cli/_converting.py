"""What all commands around conversion share."""

from __future__ import annotations

import filecmp
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.markdown import Markdown

from efficient_attn.cli._drawing import draw_layers

if TYPE_CHECKING:
    from torch import Tensor

    from efficient_attn.convert.report import ConversionReport
    from efficient_attn.integrations.verification import Verification

console = Console()

VERIFY = ("none", "quick", "full")


@dataclass(frozen=True)
class Bounds:
    """On what text an output is verified, how thoroughly, and what it must hold to."""

    text: Path | None
    text_tokens: int
    max_kl: float | None
    max_ppl_ratio: float | None
    verify: str = "quick"


def carry_out(
    src: Path,
    dst: Path,
    to: str,
    flags: dict[str, bool],
    options: dict[str, object],
    report: Path | None,
    bounds: Bounds,
) -> None:
    """Convert, report and verify; what every verb does after reading its options.

    Exits with 1 if a bound is exceeded, and with 2 if nothing was converted.
    """
    text, bounded = bounds.text, (bounds.max_kl, bounds.max_ppl_ratio) != (None, None)
    _check(bounds.verify)
    if bounded and (text is None or bounds.verify == "none"):
        fail("--max-kl and --max-ppl-ratio are measured on a text: pass --text FILE.")
    calib = options.get("calib")
    if text is not None and calib is not None and _same(text, calib):
        fail("--text is the text of --calib; measure on one that nothing was fitted to.")
    from efficient_attn.convert import convert

    verifies = text is not None and bounds.verify != "none" and not flags["dry_run"]
    seconds, start = {}, time.perf_counter()
    with errors_in_one_line():
        if verifies and bounds.verify == "full" and calib is not None:
            options = {**options, "held_out": _rows(src, text, bounds.text_tokens)}
        found = convert(src, dst, to, progress=True, **flags, **options)
    seconds["converting"] = time.perf_counter() - start
    console.print(Markdown(found.markdown()))
    verification = None
    if verifies:
        start = time.perf_counter()
        verification = verified(src, dst, text, bounds.text_tokens, bounds.verify)
        seconds["verifying"] = time.perf_counter() - start
    write_report(report, found, verification, text, seconds)
    if verification is not None:
        hold_to_bounds(verification, bounds.max_kl, bounds.max_ppl_ratio)


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def verified(src: Path, dst: Path, text: Path, tokens: int, verify: str) -> Verification:
    """Compare two checkpoints on a text, and show what was found."""
    _check(verify)
    with errors_in_one_line():
        try:
            from efficient_attn.integrations.verification import LONG, verify_folders
        except ImportError as error:
            fail(f"verifying needs transformers ({error}): pip install 'efficient_attn[hf]'.")
        from efficient_attn.convert.pipeline import open_source
        from efficient_attn.convert.text import rows_of_text

        long_row = None
        if verify == "full":
            length = min(LONG, open_source(src).config["max_position_embeddings"])
            long_row = rows_of_text(src, text, tokens=length, length=length)
        rows = _rows(src, text, tokens)
        found = verify_folders(src, dst, rows, long_row=long_row, dtype="auto", progress=True)
    console.print(Markdown(found.markdown()))
    return found


def _rows(src: Path, text: Path, tokens: int) -> Tensor:
    from efficient_attn.convert.text import rows_of_text

    return rows_of_text(src, text, tokens=tokens, length=min(512, tokens))


def _check(verify: str) -> None:
    if verify not in VERIFY:
        fail(f"--verify is {verify!r}; take one of {', '.join(VERIFY)}.")


def hold_to_bounds(found: Verification, max_kl: float | None, max_ppl_ratio: float | None) -> None:
    """Exit with 1 where a bound is exceeded."""
    broken = found.comparison.broken_bounds(max_kl=max_kl, max_ppl_ratio=max_ppl_ratio)
    if broken:
        console.print(f"{'; '.join(broken)}.", style="red", markup=False)
        raise typer.Exit(1)


def write_report(
    path: Path | None,
    report: ConversionReport | None,
    verification: Verification | None,
    text: Path | None,
    seconds: dict[str, float],
) -> None:
    """The same for programs and for people, with a figure of what each layer lost."""
    if path is None:
        return
    from efficient_attn.convert.checkpoint import file_digest

    told: dict[str, object] = {} if report is None else report.as_dict()
    pages = [] if report is None else [report.markdown()]
    path.parent.mkdir(parents=True, exist_ok=True)
    if report is not None and draw_layers(report.layers, path.with_suffix(".png")):
        pages.append(f"![What each layer lost]({path.with_suffix('.png').name})\n")
    if verification is not None:
        told["verification"] = verification.as_dict()
        told["text"] = {"sha256": file_digest(text), "tokens": verification.comparison.tokens}
        pages.append(f"# Verification\n\n{verification.markdown()}")
        pages.append(f"Text with SHA-256 {told['text']['sha256']}.\n")
        if report is not None and report.losses:
            told["added_nats"] = _added_nats(report.losses, verification)
            from efficient_attn.convert.report import table

            rows = [(name, f"{nats:.4f}") for name, nats in told["added_nats"].items()]
            pages.append("\n".join(table(("nats per token added", ""), rows)) + "\n")
    told["seconds"] = seconds
    pages.append("; ".join(f"{name}: {spent:.1f} s" for name, spent in seconds.items()) + "\n")
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text("\n".join(pages), encoding="utf-8")


def _added_nats(losses: dict[str, float], verification: Verification) -> dict[str, float]:
    """What turning less adds to the loss, and what caching less adds to that."""
    by_turning = losses["turned in part"] - losses["source"]
    everything = math.log(verification.comparison.perplexity_ratio)
    return {"by turning less": by_turning, "by caching less": everything - by_turning}


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What goes wrong in here is printed without a traceback, and ends the command with 2."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Say why, and exit with 2."""
    Console(stderr=True).print(message, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(2)
