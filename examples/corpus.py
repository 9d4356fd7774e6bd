"""The text behind the example model: Python's own standard library, split by file.

Every Python installation carries this text, so nothing has to be downloaded and anyone can
measure the shipped model on files that it has never seen::

    for path, text in python_sources("test"):
        print(path, len(text))

A file's split depends on its path alone. A file that keeps its place from one Python version to
the next therefore keeps its split, whatever happens to its neighbours.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

Split = Literal["train", "calibration", "test"]

# Percentages of files; what is left over is training text.
CALIBRATION_PERCENT = 5
TEST_PERCENT = 5

# Folders left out, at any depth.
SKIPPED_FOLDERS = frozenset(
    {
        # Not part of the standard library.
        "site-packages",
        "dist-packages",
        # Test suites: several Linux distributions do not ship them, and everyone should see
        # the same corpus.
        "test",
        "tests",
        "idle_test",
        # Tables rather than programs.
        "encodings",
        "pydoc_data",
        # Near copies of other modules, which would leak from one split into another.
        "lib2to3",
        "__phello__",
    }
)

# Generated files: build settings of one machine, and a table of character names.
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "html/entities.py")


def python_sources(split: Split) -> Iterator[tuple[str, str]]:
    """Yield ``(relative path, text)`` for each file of a split, in order of path.

    Paths are relative to the standard library and use forward slashes on every system.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(files):
        if is_program(name) and split_of(name) == split:
            try:
                yield name, files[name].read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def is_program(name: str) -> bool:
    """Whether a path in the standard library holds code that a person wrote."""
    return not (
        name.startswith(SKIPPED_PREFIXES) or SKIPPED_FOLDERS.intersection(PurePosixPath(name).parts)
    )


def split_of(name: str) -> Split:
    """The split of a path, the same on every machine and under every Python version."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    percent = int.from_bytes(digest, "big") % 100
    if percent < TEST_PERCENT:
        return "test"
    if percent < TEST_PERCENT + CALIBRATION_PERCENT:
        return "calibration"
    return "train"
