"""The one function that users call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from efficient_attn.convert import to_diffqkv, to_mla
from efficient_attn.convert.pipeline import Conversion, open_source, run
from efficient_attn.convert.report import ConversionReport
from efficient_attn.convert.source import Source

# What plans a conversion, and the options that it takes.
METHODS: dict[str, tuple[Callable[[Source, object], Conversion], type]] = {
    "diffqkv": (to_diffqkv.plan, to_diffqkv.DiffQKVOptions),
    "mla": (to_mla.plan, to_mla.MlaOptions),
}


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "mla",
    *,
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
        to: What to convert to: ``"mla"`` or ``"diffqkv"``.
        dry_run: Only say what would be done; nothing is written, and of ``src`` no weight is read.
        resume: Go on with a conversion that was interrupted; it ends with the same bytes.
        force: Replace a checkpoint that is at ``dst``.
        progress: Show a progress bar.
        options: Of the method: the fields of :class:`efficient_attn.convert.to_mla.MlaOptions` or
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
    plan, kind = METHODS[to]
    chosen = kind(**options)
    source = open_source(src)
    conversion = plan(source, chosen)
    if dry_run:
        return ConversionReport.before(conversion)
    return run(source, conversion, Path(dst), resume=resume, force=force, progress=progress)
