"""The one function that users call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from efficient_attn.convert import to_diffqkv, to_gqa, to_mla
from efficient_attn.convert.activations import Activations
from efficient_attn.convert.encoder_activations import EncoderActivations
from efficient_attn.convert.hidden_states import HiddenStates
from efficient_attn.convert.images import pixels_of_images
from efficient_attn.convert.pipeline import Conversion, check_apart, open_source, run
from efficient_attn.convert.report import ConversionReport
from efficient_attn.convert.source import Source
from efficient_attn.convert.text import rows_of_text
from efficient_attn.convert.writer import check_destination
from efficient_attn.errors import ConversionError


@dataclass(frozen=True)
class Method:
    """One kind of conversion.

    Attributes:
        plan: From a source, options, what makes calibration tokens flow or None, ``dry_run`` and
            ``progress`` to what is to be done.
        options: The options that it takes.
        encoders: Whether it knows them, beside decoders.
    """

    plan: Callable[..., Conversion]
    options: type
    encoders: bool = False


METHODS = {
    "diffqkv": Method(to_diffqkv.plan, to_diffqkv.DiffQKVOptions),
    "gqa": Method(to_gqa.plan, to_gqa.GqaOptions, encoders=True),
    "mla": Method(to_mla.plan, to_mla.MlaOptions),
}
# Tokens in a row of calibration text.
CALIBRATION_LENGTH = 512


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "mla",
    *,
    calib: str | Path | Tensor | None = None,
    calib_tokens: int = 65536,
    calib_length: int = CALIBRATION_LENGTH,
    held_out: str | Path | Tensor | None = None,
    device: str = "cpu",
    max_memory: float | None = None,
    shard_size: float | None = None,
    dry_run: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    **options: object,
) -> ConversionReport:
    """Convert the attention of a checkpoint, layer by layer.

    Args:
        src: A folder with ``config.json`` and safetensors, of a family that
            :data:`efficient_attn.convert.families.FAMILIES` knows; for ``to="gqa"`` also a BERT, or
            a vision transformer of transformers or timm.
        dst: Folder of the output. It appears when all of it is there.
        to: What to convert to: ``"mla"``, ``"gqa"`` or ``"diffqkv"``.
        calib: What a lossy conversion is fitted to: a file of text, or rows of tokens ``(B, N)``;
            for a vision transformer a folder of images, an ``.npy`` file, or pixel values
            ``(B, C, H, W)``. Measure the result on something else.
        calib_tokens: How many tokens to use. An image is one for each patch and one more.
        calib_length: How many of them in a row: as far back as attention is seen to look.
        held_out: A text of its own, or rows of tokens, to tell on how much of what ``"mla"`` loses
            in mode ``"compress"`` is lost by turning less, and how much by caching less. Takes as
            long as calibration does.
        device: Where the model is computed on calibration tokens, ``"cpu"`` or ``"cuda"``.
            Everything else is on the CPU.
        max_memory: Gigabytes; a conversion that is estimated to take more is refused.
        shard_size: Gigabytes that no file of the output exceeds, unless a single tensor does. There
            is one file for each layer, or more.
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
    chosen = method.options(**options)
    if shard_size is not None and shard_size <= 0:
        raise ValueError(f"shard_size is {shard_size} GB; it must be above 0.")
    source = open_source(src)
    if not source.family.causal and not method.encoders:
        known = (name for name, each in METHODS.items() if each.encoders)
        raise ConversionError(
            f"{source.config['model_type']!r} is an encoder, which nothing is cached of; it is "
            f"converted to {' or '.join(known)}, not to {to}."
        )
    check_apart(source, Path(dst))
    if not dry_run and not resume:
        # At once, rather than after calibration.
        check_destination(Path(dst), resume=resume, force=force)

    def rows(given: str | Path | Tensor) -> Tensor:
        if isinstance(given, Tensor):
            return given
        return read_inputs(src, source, given, calib_tokens, calib_length)

    def flow() -> HiddenStates:
        kind = Activations if source.family.causal else EncoderActivations
        return kind(source, rows(calib), device=device)

    def planned(*, dry_run: bool) -> Conversion:
        calibration = None if calib is None else flow
        return method.plan(source, chosen, calibration, dry_run=dry_run, progress=progress)

    if max_memory is not None:
        _refuse_memory(planned(dry_run=True), max_memory)
    measured = None if held_out is None else rows(held_out)
    conversion = planned(dry_run=dry_run)
    if dry_run:
        return ConversionReport.before(conversion)
    report = run(
        source,
        conversion,
        Path(dst),
        shard_bytes=None if shard_size is None else max(1, int(shard_size * 1e9)),
        resume=resume,
        force=force,
        progress=progress,
    )
    if measured is None or conversion.less_turned is None:
        return report
    return replace(report, losses=conversion.less_turned(measured))


def read_inputs(
    folder: str | Path, source: Source, given: str | Path, tokens: int, length: int
) -> Tensor:
    """So many tokens of a text, or of images, as a model takes them.

    Args:
        folder: The model's, with its tokenizer or what it says of images.
        source: The model.
        given: A file of text; a folder of images or an ``.npy`` file.
        tokens: How many at most.
        length: Tokens of a row of text.

    Raises:
        ConversionError: There are not so many, or they cannot be read.
    """
    config = source.config
    if "image_size" in config:
        most = max(1, tokens // (1 + config["patches"]))
        return pixels_of_images(folder, config, given, most=most)
    length = min(length, tokens)
    if source.family.causal:
        return rows_of_text(folder, given, tokens=tokens, length=length)
    length = min(length, config["max_position_embeddings"])
    return rows_of_text(folder, given, tokens=tokens, length=length, ends=True)


def _refuse_memory(conversion: Conversion, most: float) -> None:
    if conversion.memory_bytes > most * 1e9:
        raise ConversionError(
            f"this takes about {conversion.memory_bytes / 1e9:.2f} GB of memory, and max_memory is "
            f"{most:g}. Without loss takes least; give more, or convert on a larger machine."
        )
