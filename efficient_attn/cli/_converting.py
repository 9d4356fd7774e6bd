"""What all commands around conversion share."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.markdown import Markdown

if TYPE_CHECKING:
    from efficient_attn.convert.report import ConversionReport
    from efficient_attn.integrations.verification import Verification

console = Console()


def carry_out(
    src: Path,
    dst: Path,
    to: str,
    flags: dict[str, bool],
    options: dict[str, object],
    report: Path | None,
    bounds: tuple[Path | None, int, float | None, float | None],
) -> None:
    """Convert, report and verify; what every verb does after reading its options.

    Exits with 1 if a bound is exceeded, and with 2 if nothing was converted.
    """
    text, text_tokens, max_kl, max_ppl_ratio = bounds
    if text is None and (max_kl is not None or max_ppl_ratio is not None):
        fail("--max-kl and --max-ppl-ratio are measured on a text: pass --text FILE.")
    calib = options.get("calib")
    if text is not None and calib is not None and _same(text, calib):
        fail("--text is the text of --calib; measure on one that nothing was fitted to.")
    from efficient_attn.convert import convert

    with errors_in_one_line():
        found = convert(src, dst, to, progress=True, **flags, **options)
    console.print(Markdown(found.markdown()))
    verification = None
    if text is not None and not flags["dry_run"]:
        verification = verified(src, dst, text, text_tokens)
    write_report(report, found, verification)
    if verification is not None:
        hold_to_bounds(verification, max_kl, max_ppl_ratio)


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def verified(src: Path, dst: Path, text: Path, tokens: int) -> Verification:
    """Compare two checkpoints on a text, and show what was found."""
    with errors_in_one_line():
        try:
            from efficient_attn.integrations.verification import verify_folders
        except ImportError as error:
            fail(f"verifying needs transformers ({error}): pip install 'efficient_attn[hf]'.")
        from efficient_attn.convert.text import rows_of_text

        rows = rows_of_text(src, text, tokens=tokens, length=min(512, tokens))
        found = verify_folders(src, dst, rows, dtype="auto", progress=True)
    console.print(Markdown(found.markdown()))
    return found


def hold_to_bounds(found: Verification, max_kl: float | None, max_ppl_ratio: float | None) -> None:
    """Exit with 1 where a bound is exceeded."""
    broken = found.comparison.broken_bounds(max_kl=max_kl, max_ppl_ratio=max_ppl_ratio)
    if broken:
        console.print(f"{'; '.join(broken)}.", style="red", markup=False)
        raise typer.Exit(1)


def write_report(
    path: Path | None, report: ConversionReport | None, verification: Verification | None
) -> None:
    """The same for programs and for people."""
    if path is None:
        return
    told = {} if report is None else report.as_dict()
    pages = [] if report is None else [report.markdown()]
    if verification is not None:
        told["verification"] = verification.as_dict()
        pages.append(f"# Verification\n\n{verification.markdown()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text("\n".join(pages), encoding="utf-8")


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
