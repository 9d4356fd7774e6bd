"""The one function that users call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from efficient_attn.convert import to_diffqkv, to_gqa, to_mla
from efficient_attn.convert.activations import Activations
from efficient_attn.convert.pipeline import Conversion, check_apart, open_source, run
from efficient_attn.convert.report import ConversionReport
from efficient_attn.convert.text import rows_of_text
from efficient_attn.convert.writer import check_destination


@dataclass(frozen=True)
class Method:
    """One kind of conversion.

    Attributes:
        plan: From a source and options to what is to be done; if ``calibrates``, also from what
            makes calibration tokens flow, ``dry_run`` and ``progress``.
        options: The options that it takes.
        calibrates: Whether it may be fitted to a text.
    """

    plan: Callable[..., Conversion]
    options: type
    calibrates: bool = False


METHODS = {
    "diffqkv": Method(to_diffqkv.plan, to_diffqkv.DiffQKVOptions),
    "gqa": Method(to_gqa.plan, to_gqa.GqaOptions, calibrates=True),
    "mla": Method(to_mla.plan, to_mla.MlaOptions, calibrates=True),
}
CALIBRATION_LENGTH = 512


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "mla",
    *,
    calib: str | Path | Tensor | None = None,
    calib_tokens: int = 65536,
    dry_run: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    **options: object,
) -> ConversionReport:
    """Convert the attention of a checkpoint, layer by layer.

    Args:
        src: A folder with ``config.json`` and safetensors, of a family that
            :data:`efficient_attn.convert.families.FAMILIES` knows.
        dst: Folder of the output. It appears when all of it is there.
        to: What to convert to: ``"mla"``, ``"gqa"`` or ``"diffqkv"``.
        calib: What a lossy conversion is fitted to: a file of text, or rows of tokens ``(B, N)``.
            Measure the result on another text.
        calib_tokens: How many tokens of the file to use, in rows of 512.
        dry_run: Only say what would be done; nothing is written, and of ``src`` no weight is read.
        resume: Go on with a conversion that was interrupted; it ends with the same bytes.
        force: Replace a checkpoint that is at ``dst``.
        progress: Show a progress bar.
        options: Of the method: the fields of :class:`efficient_attn.convert.to_mla.MlaOptions`,
            :class:`efficient_attn.convert.to_gqa.GqaOptions` or
            :class:`efficient_attn.convert.to_diffqkv.DiffQKVOptions`.

    Returns:
        What was done, or would be.

    Raises:
        ValueError: An option has no such value.
        ConversionError: The source is not what it says, cannot be converted in this way, or the
            output cannot be written. ``dst`` is as it was.

    Example:
        >>> convert("llama", "llama-mla", mode="rorope", target="hf-deepseek")
    """
    if to not in METHODS:
        raise ValueError(f"to is {to!r}; take one of {', '.join(METHODS)}.")
    method = METHODS[to]
    if calib is not None and not method.calibrates:
        raise ValueError(f"calib is given, and conversion to {to!r} is not fitted to anything.")
    chosen = method.options(**options)
    source = open_source(src)
    check_apart(source, Path(dst))
    if not dry_run and not resume:
        # At once, rather than after calibration.
        check_destination(Path(dst), resume=resume, force=force)

    def flow() -> Activations:
        rows = calib
        if not isinstance(rows, Tensor):
            length = min(CALIBRATION_LENGTH, calib_tokens)
            rows = rows_of_text(src, calib, tokens=calib_tokens, length=length)
        return Activations(source, rows)

    if method.calibrates:
        calibration = None if calib is None else flow
        conversion = method.plan(source, chosen, calibration, dry_run=dry_run, progress=progress)
    else:
        conversion = method.plan(source, chosen)
    if dry_run:
        return ConversionReport.before(conversion)
    return run(source, conversion, Path(dst), resume=resume, force=force, progress=progress)
