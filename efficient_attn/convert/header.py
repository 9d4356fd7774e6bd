"""The header of a safetensors file, checked before any of its data is read.

Layout: 8 bytes with the length of the header, little endian; the header, a JSON object from tensor
name to dtype, shape and offsets; the data. Source: the format's specification, in its repository.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from efficient_attn.errors import ConversionError

# The bound that the safetensors library itself sets.
MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor of a checkpoint lies.

    Attributes:
        path: Its file.
        dtype: Of its elements.
        shape: Its sizes.
        start: First byte in the file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in the order in which their data lies.

    Raises:
        ConversionError: The header is not one that describes exactly the bytes behind it: too long,
            not JSON, a name twice, a dtype that conversion does not read, a shape that does not
            fill its bytes, or data that overlaps, leaves gaps or ends outside the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ConversionError(
                f"{path.name} is no safetensors file: it says that its header has {length} bytes, "
                f"of {size} in the file (at most {MAX_HEADER_BYTES} are read). Fetch it again."
            )
        header = parse_json(file.read(length), path.name)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    expected = 8 + length
    for name, entry in entries.items():
        if entry.start != expected:
            kind = "overlaps the tensor before it" if entry.start < expected else "leaves a gap"
            raise ConversionError(f"{path.name}: the data of {name!r} {kind}. Fetch it again.")
        expected += entry.nbytes
    if expected != size:
        raise ConversionError(
            f"{path.name} has {size} bytes, but its tensors end at {expected}; the download may be "
            "incomplete. Fetch it again."
        )
    return entries


def parse_json(text: bytes, name: str) -> dict:
    """A JSON object in which no key comes twice; anything else is a :class:`ConversionError`."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ConversionError(f"{name} has a key twice: which one counts is anyone's guess.")
        return found

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{name} is not JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise ConversionError(f"{name} holds a JSON {type(parsed).__name__}, not an object.")
    return parsed


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a small file; one of more than ``most`` bytes is a :class:`ConversionError`."""
    size = os.stat(path).st_size
    if size > most:
        raise ConversionError(f"{path.name} has {size} bytes; at most {most} are read.")
    return path.read_bytes()


def _entry(path: Path, name: str, fields: object, data: int) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ConversionError(
            f"{path.name}: tensor {name!r} must have dtype, shape and data_offsets, no more."
        )
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConversionError(
            f"{path.name}: tensor {name!r} has dtype {dtype!r}; conversion reads "
            f"{', '.join(DTYPES)}. Undo a quantisation first."
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ConversionError(
            f"{path.name}: the shape and data_offsets of tensor {name!r} must be lists of at most "
            f"{MAX_RANK} whole numbers from 0 to 2**63 - 1, the offsets two."
        )
    entry = TensorEntry(path, DTYPES[dtype], tuple(shape), data + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise ConversionError(
            f"{path.name}: tensor {name!r} of shape {shape} and dtype {dtype} takes {entry.nbytes} "
            f"bytes, but its data_offsets {offsets} hold {offsets[1] - offsets[0]}."
        )
    return entry


def _naturals(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_RANK
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )
