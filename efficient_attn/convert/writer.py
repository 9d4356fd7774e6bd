"""Writing a converted checkpoint so that it appears whole or not at all.

Shards go to a folder beside the destination, which is renamed to it at the very end. Beside them
``state.json`` lists what is finished, so a conversion that was killed goes on where it was, and
ends with the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from efficient_attn.convert.checkpoint import INDEX, MAX_CONFIG_BYTES, file_digest
from efficient_attn.convert.header import parse_json, read_bounded
from efficient_attn.convert.report import flat
from efficient_attn.errors import ConversionError

STATE = "state.json"


class StagedCheckpoint:
    """A checkpoint in the making, one safetensors file per part, or several of a large one.

    Args:
        destination: The folder that it becomes. It must not exist, or be empty, or be a checkpoint
            that ``force`` allows to replace.
        parts: Names of the parts, in order.
        identity: What decides the bytes of the output: digests of the source, options, versions. An
            unfinished conversion is only resumed with an equal one.
        needed_bytes: Room that all parts take, asked for before anything is written.
        shard_bytes: Size that no file exceeds, but for one that holds a single larger tensor.
        resume: Go on with an unfinished conversion of the same identity.
        force: Replace what is there.

    Raises:
        ConversionError: The destination is in use, an unfinished conversion is in the way or not
            the same, or there is not enough room.
    """

    def __init__(
        self,
        destination: Path,
        parts: Sequence[str],
        identity: Mapping[str, object],
        *,
        needed_bytes: int = 0,
        shard_bytes: int | None = None,
        resume: bool = False,
        force: bool = False,
    ) -> None:
        self.destination = destination.absolute()
        self.parts = tuple(parts)
        self._staging = staging_of(self.destination)
        self._model = self._staging / "model"
        self._shard_bytes = shard_bytes
        self._done: dict[str, dict] = {}
        identity = json.loads(json.dumps(identity))
        check_destination(self.destination, resume=resume, force=force)
        if self._staging.exists():
            self._take_up(identity, resume, force)
        with self._one_clear_error():
            self._model.mkdir(parents=True, exist_ok=True)
            for leftover in self._model.iterdir():
                if leftover.name not in self.digests:
                    leftover.unlink()
            self._identity = identity
            self._save_state()
        needed = needed_bytes - sum(file["bytes"] for file in self._files())
        free = shutil.disk_usage(self._staging).free
        if needed > free:
            if not self._done:
                shutil.rmtree(self._staging)
            raise ConversionError(
                f"{self.destination} needs {needed / 1e9:.2f} GB more and the disk has "
                f"{free / 1e9:.2f} GB free. Make room, or convert to another disk."
            )

    def is_done(self, part: str) -> bool:
        """Whether a part is finished."""
        return part in self._done

    @property
    def notes(self) -> dict[str, dict]:
        """What was noted with each finished part, in order."""
        return {part: self._done[part]["notes"] for part in self.parts if part in self._done}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the files of all finished parts, in order, by file name."""
        return {file["file"]: file["sha256"] for file in self._files()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of finished parts, mapped from their files."""
        files = {name: file["file"] for file in self._files() for name in file["tensors"]}
        found = {}
        for name in names:
            with safe_open(self._model / files[name], framework="pt") as file:
                found[name] = file.get_tensor(name)
        return found

    def write(self, part: str, tensors: Mapping[str, Tensor], notes: Mapping | None = None) -> None:
        """Store the tensors of a part; from here on it is finished.

        Raises:
            ConversionError: The disk is full or fails; finished parts stay, for ``resume``.
        """
        files = []
        with self._one_clear_error():
            for count, names in enumerate(_shards(tensors, self._shard_bytes), start=1):
                shard = {name: tensors[name].contiguous() for name in names}
                file = self._model / self._file_name(part, count)
                partial = file.with_name(f"{file.name}.partial")
                save_file(shard, partial, metadata={"format": "pt"})
                _sync(partial)
                files.append(
                    {
                        "file": file.name,
                        "sha256": file_digest(partial),
                        "bytes": sum(tensor.nbytes for tensor in shard.values()),
                        "tensors": names,
                    }
                )
                partial.rename(file)
            # Notes as they come back from state.json, so that a resumed run tells the same.
            self._done[part] = {"files": files, "notes": json.loads(as_json(dict(notes or {})))}
            self._save_state()

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Add the index and other files, and put the whole in its place.

        Raises:
            ConversionError: A part is missing, or the disk is full or fails.
        """
        missing = [part for part in self.parts if part not in self._done]
        if missing:
            raise ConversionError(f"parts that were not written: {', '.join(missing)}.")
        written = list(self._files())
        index = {
            "metadata": {"total_size": sum(file["bytes"] for file in written)},
            "weight_map": {name: file["file"] for file in written for name in file["tensors"]},
        }
        with self._one_clear_error():
            for name, content in {**files, INDEX: as_json(index)}.items():
                (self._model / name).write_bytes(content)
                _sync(self._model / name)
            replaced = self._staging / "replaced"
            if self.destination.exists():
                self.destination.rename(replaced)
            try:
                self._model.rename(self.destination)
            except OSError:
                if replaced.exists():
                    replaced.rename(self.destination)
                raise
            shutil.rmtree(self._staging)

    def _take_up(self, identity: dict, resume: bool, force: bool) -> None:
        """Load the state of an unfinished conversion, or clear it away."""
        if not resume:
            shutil.rmtree(self._staging)
            return
        if not (self._staging / STATE).exists():
            return  # killed before the first state was written
        state = parse_json(read_bounded(self._staging / STATE, MAX_CONFIG_BYTES), STATE)
        before, identity = flat(state["identity"]), flat(identity)
        changed = sorted(k for k in {*before, *identity} if before.get(k) != identity.get(k))
        if changed:
            told = "; ".join(
                f"{name} was {before.get(name)!r} and is {identity.get(name)!r}" for name in changed
            )
            raise ConversionError(
                f"the unfinished conversion in {self._staging} is another one: {told}. Resume with "
                "the same source and options, or pass force without resume to start again."
            )
        for part, done in state["parts"].items():
            paths = {self._model / file["file"]: file["sha256"] for file in done["files"]}
            if all(path.exists() and file_digest(path) == sha for path, sha in paths.items()):
                self._done[part] = done

    def _files(self) -> Iterator[dict]:
        """What is known of the files of all finished parts, in order."""
        for part in self.parts:
            if part in self._done:
                yield from self._done[part]["files"]

    def _file_name(self, part: str, count: int) -> str:
        place = f"{self.parts.index(part) + 1:05}-of-{len(self.parts):05}"
        return f"model-{place}{f'-{count}' if count > 1 else ''}.safetensors"

    def _save_state(self) -> None:
        partial = self._staging / f"{STATE}.partial"
        partial.write_bytes(as_json({"identity": self._identity, "parts": self._done}))
        _sync(partial)
        partial.rename(self._staging / STATE)

    @contextmanager
    def _one_clear_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
            raise ConversionError(
                f"writing {self.destination} failed: {'the disk is full' if full else error}. "
                f"Nothing was changed there; what is finished lies in {self._staging}, and resume "
                "goes on with it."
            ) from error


def staging_of(destination: Path) -> Path:
    """Where a checkpoint is written before it takes its place."""
    return destination.with_name(f".{destination.name}.converting")


def check_destination(destination: Path, *, resume: bool, force: bool) -> None:
    """Raise a ConversionError unless a folder can be filled: missing, empty, or to be replaced.

    What is left of an earlier conversion must be resumed, or replaced too.
    """
    destination = destination.absolute()
    if staging_of(destination).exists() and not resume and not force:
        raise ConversionError(
            f"an unfinished conversion lies in {staging_of(destination)}; pass resume to go on "
            "with it, or force to start again."
        )
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise ConversionError(f"{destination} exists and is not a folder; choose another name.")
    if not destination.exists() or not any(destination.iterdir()):
        return
    if not force:
        raise ConversionError(f"{destination} is not empty; choose another folder, or pass force.")
    if not (destination / "config.json").exists():
        raise ConversionError(
            f"{destination} holds something that is no checkpoint, which force does not replace."
        )


def _shards(tensors: Mapping[str, Tensor], most: int | None) -> Iterator[list[str]]:
    """Names in order, cut where another tensor would be too many bytes for one file."""
    names: list[str] = []
    size = 0
    for name in sorted(tensors):
        if names and most is not None and size + tensors[name].nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensors[name].nbytes
    yield names


def as_json(value: object) -> bytes:
    """A value as JSON that people can read, the same bytes for equal values."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
