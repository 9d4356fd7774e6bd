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
    from efficient_attn.integrations.encoder_verification import EncoderVerification
    from efficient_attn.integrations.verification import Verification

console = Console()

VERIFY = ("none", "quick", "full")
# Tokens in a row of text for an encoder.
ENCODER_LENGTH = 128


@dataclass(frozen=True)
class Bounds:
    """On what an output is verified, how thoroughly, and what it must hold to.

    Attributes:
        text: A text; for a vision transformer, images.
        text_tokens: How many tokens of it.
        max_kl: Bound on the mean divergence of a decoder's logits.
        max_ppl_ratio: Bound on the ratio of its perplexities.
        verify: One of :data:`VERIFY`.
        min_cosine: Bound on the mean cosine of an encoder's embeddings.
    """

    text: Path | None
    text_tokens: int
    max_kl: float | None
    max_ppl_ratio: float | None
    verify: str = "quick"
    min_cosine: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """Those that are given, by name."""
        names = ("max_kl", "max_ppl_ratio", "min_cosine")
        return {name: v for name in names if (v := getattr(self, name)) is not None}

    def check(self, src: Path) -> None:
        """Exit with 2 where a bound means nothing, before anything is computed."""
        if self.verify not in VERIFY:
            fail(f"--verify is {self.verify!r}; take one of {', '.join(VERIFY)}.")
        if self.given and (self.text is None or self.verify == "none"):
            fail("--max-kl, --max-ppl-ratio and --min-cosine are measured on a text: pass --text.")
        if not self.given:
            return
        with errors_in_one_line():
            encodes = _is_encoder(src)
        if encodes and "min_cosine" not in self.given or encodes and len(self.given) > 1:
            fail("--max-kl and --max-ppl-ratio are of decoders; for an encoder pass --min-cosine.")
        if not encodes and self.min_cosine is not None:
            fail("--min-cosine is of encoders; for a decoder pass --max-kl or --max-ppl-ratio.")


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
    bounds.check(src)
    text = bounds.text
    calib = options.get("calib")
    if text is not None and calib is not None and _same(text, calib):
        fail("--text is the text of --calib; measure on one that nothing was fitted to.")
    from efficient_attn.convert import convert

    verifies = text is not None and bounds.verify != "none" and not flags["dry_run"]
    seconds, start = {}, time.perf_counter()
    with errors_in_one_line():
        if verifies and bounds.verify == "full" and calib is not None and not _is_encoder(src):
            options = {**options, "held_out": _rows(src, bounds)}
        found = convert(src, dst, to, progress=True, **flags, **options)
    seconds["converting"] = time.perf_counter() - start
    console.print(Markdown(found.markdown()))
    verification = None
    if verifies:
        start = time.perf_counter()
        verification = verified(src, dst, bounds)
        seconds["verifying"] = time.perf_counter() - start
    write_report(report, found, verification, text, seconds)
    if verification is not None:
        hold_to_bounds(verification, bounds)


def _same(one: Path, other: Path) -> bool:
    if one.is_dir() and other.is_dir():
        return one.samefile(other)
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def verified(src: Path, dst: Path, bounds: Bounds) -> Verification | EncoderVerification:
    """Compare two checkpoints on a text or on images, and show what was found."""
    with errors_in_one_line():
        try:
            from efficient_attn.integrations.encoder_verification import verify_encoders
            from efficient_attn.integrations.verification import LONG, verify_folders
        except ImportError as error:
            fail(f"verifying needs transformers ({error}): pip install 'efficient_attn[hf]'.")
        from efficient_attn.convert.converting import read_inputs
        from efficient_attn.convert.pipeline import open_source
        from efficient_attn.convert.text import rows_of_text

        if _is_encoder(src):
            inputs = (bounds.text, bounds.text_tokens, ENCODER_LENGTH)
            found = verify_encoders(
                src, dst, read_inputs(src, open_source(src), *inputs), progress=True
            )
        else:
            long_row = None
            if bounds.verify == "full":
                length = min(LONG, open_source(src).config["max_position_embeddings"])
                long_row = rows_of_text(src, bounds.text, tokens=length, length=length)
            rows = _rows(src, bounds)
            found = verify_folders(src, dst, rows, long_row=long_row, dtype="auto", progress=True)
    console.print(Markdown(found.markdown()))
    return found


def _rows(src: Path, bounds: Bounds) -> Tensor:
    from efficient_attn.convert.text import rows_of_text

    tokens = bounds.text_tokens
    return rows_of_text(src, bounds.text, tokens=tokens, length=min(512, tokens))


def _is_encoder(folder: Path) -> bool:
    from efficient_attn.convert.checkpoint import Checkpoint
    from efficient_attn.convert.encoder_configs import is_encoder

    return is_encoder(Checkpoint.open(folder).config)


def text_or_images(text: Path | None, images: Path | None) -> Path | None:
    """The one that is given."""
    if text is not None and images is not None:
        fail("pass --text or --images, whichever the model takes, not both.")
    return images if text is None else text


def hold_to_bounds(found: Verification | EncoderVerification, bounds: Bounds) -> None:
    """Exit with 1 where a bound is exceeded."""
    broken = found.broken_bounds(**bounds.given)
    if broken:
        console.print(f"{'; '.join(broken)}.", style="red", markup=False)
        raise typer.Exit(1)


def write_report(
    path: Path | None,
    report: ConversionReport | None,
    verification: Verification | EncoderVerification | None,
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
        pages.append(f"# Verification\n\n{verification.markdown()}")
        if text.is_file():
            told["text"] = {"sha256": file_digest(text), "tokens": verification.tokens}
            pages.append(f"Given a file with SHA-256 {told['text']['sha256']}.\n")
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
