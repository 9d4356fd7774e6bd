"""One conversion, from folder to folder, whatever its method.

A method looks at a source and says what it would make of it (:class:`Conversion`); nothing is read
or written until then. Its parts are computed one after the other and written as they come.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from efficient_attn.convert.checkpoint import MAX_CONFIG_BYTES, Checkpoint, inside
from efficient_attn.convert.header import parse_json, read_bounded
from efficient_attn.convert.report import REPORT, ConversionReport
from efficient_attn.convert.source import Source
from efficient_attn.convert.writer import StagedCheckpoint, as_json
from efficient_attn.errors import ConversionError

# Files beside config and weights that a converted model still needs. Code is never among them.
COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)
MAX_COPIED_BYTES = 256 << 20

Part = tuple[dict[str, Tensor], dict[str, object]]
Read = Callable[[Iterable[str]], Mapping[str, Tensor]]
Checks = Callable[[Read, Mapping[str, object]], dict[str, bytes]]


@dataclass(frozen=True)
class Conversion:
    """What a method is going to do with a source.

    Attributes:
        method: Its name.
        decisions: Everything it decided or was told that has a say in the output, as JSON.
        parts: For each part of the output, in order, what computes its tensors and what is to be
            noted of them.
        config: Makes ``config.json`` from the notes of all parts.
        bytes_per_token: Bytes of keys and values of a token in all layers, before and after.
        parameters: Number of parameters, before and after.
        output_bytes: Bytes that all parts take, about.
        memory_bytes: Memory that the largest part takes while it is made, about.
        parallel: Cached bytes per token on each of 1, 2, 4 and 8 devices that share the heads,
            before and after.
        warnings: What a user should know before using the output.
        checks: Makes files for checking the output where it is used, from what reads its tensors
            and from its config, if there are any.
        less_turned: From rows of tokens to losses, in nats per token, of the source and of the
            model that turns as few channels as the output and keeps everything else.
        cached: Whether keys and values are cached; an encoder's are not.
    """

    method: str
    decisions: Mapping[str, object]
    parts: Mapping[str, Callable[[], Part]]
    config: Callable[[Mapping[str, dict]], dict[str, object]]
    bytes_per_token: tuple[int, int]
    parameters: tuple[int, int]
    output_bytes: int
    memory_bytes: int
    parallel: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    checks: Checks | None = None
    less_turned: Callable[[Tensor], dict[str, float]] | None = None
    cached: bool = True


def run(
    source: Source,
    conversion: Conversion,
    destination: Path,
    *,
    shard_bytes: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Carry a conversion out.

    Args:
        source: What is converted.
        conversion: How.
        destination: Folder of the output, which appears when all of it is there.
        shard_bytes: Size that no file of the output exceeds, unless one tensor does.
        resume: Go on with an unfinished run of the same conversion; of a finished one, do nothing.
        force: Replace a checkpoint that is there.
        progress: Show a progress bar.

    Raises:
        ConversionError: The destination cannot be used, the disk is full, or a weight is of no use.
    """
    check_apart(source, destination)
    identity = {
        "efficient_attn": _version(),
        "source": source.checkpoint.digest,
        "method": conversion.method,
        "decisions": dict(conversion.decisions),
        "shard_bytes": shard_bytes,
    }
    if resume and (finished := _finished(destination, identity)):
        return finished
    staged = StagedCheckpoint(
        destination,
        list(conversion.parts),
        identity,
        needed_bytes=conversion.output_bytes,
        shard_bytes=shard_bytes,
        resume=resume,
        force=force,
    )
    bar = tqdm(conversion.parts.items(), unit="part", desc="converting", disable=not progress)
    for name, compute in bar:
        if not staged.is_done(name):
            staged.write(name, *compute())
    report = ConversionReport.of(source, conversion, identity, staged.notes, staged.digests)
    files = dict(_copied(source.checkpoint.folder))
    config = conversion.config(staged.notes)
    if conversion.checks is not None:
        files |= conversion.checks(staged.read, config)
    files["config.json"] = as_json(config)
    files[REPORT] = as_json(report.as_dict())
    files[REPORT.replace(".json", ".md")] = report.markdown().encode()
    staged.finish(files)
    return report


def check_apart(source: Source, destination: Path) -> None:
    """Raise a ConversionError if a destination is the source, or lies in it."""
    folder = source.checkpoint.folder.resolve()
    if destination.resolve() == folder or folder in destination.resolve().parents:
        raise ConversionError(f"{destination} is the source or lies in it; choose another folder.")


def _version() -> str:
    try:
        return importlib.metadata.version("efficient_attn")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report_in(folder: Path) -> ConversionReport | None:
    """What a conversion wrote of itself into its output; None in any other folder.

    Raises:
        ConversionError: What is there is no such report.
    """
    if not (folder / REPORT).exists():
        return None
    told = parse_json(read_bounded(folder / REPORT, MAX_CONFIG_BYTES), REPORT)
    try:
        return ConversionReport(**told)
    except TypeError as error:
        raise ConversionError(f"{folder / REPORT} is no report of a conversion: {error}") from error


def _finished(destination: Path, identity: Mapping[str, object]) -> ConversionReport | None:
    """The report of an equal conversion that the destination holds already."""
    found = report_in(destination)
    same = found is not None and found.identity == json.loads(json.dumps(identity))
    return found if same else None


def _copied(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name in COPIED:
        if (folder / name).exists():
            content = read_bounded(inside(folder, name), MAX_COPIED_BYTES)
            if name == "tokenizer_config.json":
                told = parse_json(content, name)
                if told.pop("auto_map", None) is not None:
                    content = as_json(told)
            yield name, content


def open_source(folder: str | Path) -> Source:
    """A checked checkpoint folder as attention layers."""
    return Source.open(Checkpoint.open(folder))
