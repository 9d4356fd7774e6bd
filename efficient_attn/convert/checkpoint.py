"""A checkpoint folder that nobody has to trust.

Only JSON and safetensors are read. Everything that such a folder claims is checked before a tensor
is read or memory for it is taken; no code of it is run, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from efficient_attn.convert.header import TensorEntry, parse_json, read_bounded, read_header
from efficient_attn.errors import ConversionError

MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The config and the tensors of a checked folder; tensors are read when asked for.

    Attributes:
        folder: Where it lies.
        config: What its ``config.json`` says.
        tensors: What its safetensors files hold, by name.
    """

    folder: Path
    config: Mapping[str, object]
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Check a folder and what its headers say; no tensor data is read.

        Raises:
            ConversionError: The folder is not a checkpoint of JSON and safetensors alone, or one of
                its claims is false; the message says which.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ConversionError(f"{folder} is not a folder; pass one with a config.json in it.")
        config = parse_json(
            read_bounded(inside(folder, "config.json"), MAX_CONFIG_BYTES), "config.json"
        )
        if "auto_map" in config:
            raise ConversionError(
                "config.json has an auto_map: the model is defined by code that comes with it, "
                "which is never run. Only models that need no code of their own are converted."
            )
        if (folder / INDEX).exists():
            return cls(folder, config, _indexed(folder))
        if (folder / SINGLE).exists():
            return cls(folder, config, read_header(inside(folder, SINGLE)))
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        if pickled:
            raise ConversionError(
                f"{folder} has its weights in {', '.join(pickled[:3])}: pickles, which can run any "
                "code when they are read. Save the model with safetensors first."
            )
        raise ConversionError(f"{folder} has neither {SINGLE} nor {INDEX}.")

    @property
    def files(self) -> list[Path]:
        """Its safetensors files, in order of name."""
        return sorted({entry.path for entry in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, mapped from their files: memory is taken as they are looked at."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].path, []).append(name)
        found = {}
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in wanted:
                    found[name] = file.get_tensor(name)
        return found

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each safetensors file, by name."""
        return {path.name: file_digest(path) for path in self.files}

    @cached_property
    def digest(self) -> str:
        """One SHA-256 of the config and every weight."""
        told = json.dumps([self.config, self.digests], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def inside(folder: Path, name: str) -> Path:
    """The path of a regular file of a folder.

    A link may lead to another file of the folder, or from a snapshot of the hub's cache into the
    blobs of the same repository.

    Raises:
        ConversionError: There is no such file, or a link leads out.
    """
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.exists():
        raise ConversionError(f"{folder} has no {name}.")
    snapshot = root.parent.name == "snapshots" and path.parent == root.parent.parent / "blobs"
    if path.parent != root and not snapshot:
        raise ConversionError(
            f"{name} is a link to {path}, outside of {folder}; only links into the blobs of a hub "
            "cache are followed. Copy the file to its place."
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConversionError(f"{name} is not a regular file.")
    return folder / name


def _indexed(folder: Path) -> dict[str, TensorEntry]:
    """Tensors of the files that the index names, which must agree with it to the last name."""
    index = parse_json(read_bounded(inside(folder, INDEX), MAX_INDEX_BYTES), INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{INDEX} has no weight_map from tensor names to files.")
    for name, file in weight_map.items():
        if not _is_plain_file_name(file):
            raise ConversionError(
                f"{INDEX} says that {name!r} lies in {file!r}; that must be the plain name of a "
                ".safetensors file in the same folder."
            )
    tensors: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        for name, entry in read_header(inside(folder, file)).items():
            if weight_map.get(name) != file:
                raise ConversionError(
                    f"{file} holds {name!r}, which {INDEX} places in {weight_map.get(name)!r}. "
                    "Which one counts is anyone's guess; fetch the checkpoint again."
                )
            tensors[name] = entry
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ConversionError(
            f"{INDEX} names {len(missing)} tensors that their files do not hold, such as "
            f"{missing[0]!r}. Fetch the checkpoint again."
        )
    return tensors


def _is_plain_file_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and not any(character in name for character in "/\\:\0")
    )
