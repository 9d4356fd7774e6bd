"""Computing without the native kernels, to compare with and without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from efficient_attn.ops import cuda, native


@contextlib.contextmanager
def without_native_kernels() -> Iterator[None]:
    """In this context no kernel of csrc/ answers; those that did before do so again afterwards."""
    kinds = ((native, native.use_native), (cuda, cuda.use_cuda))
    usable = [use for kind, use in kinds if kind.status() is None]
    for use in usable:
        use().remove()
    try:
        yield
    finally:
        for use in usable:
            use()
