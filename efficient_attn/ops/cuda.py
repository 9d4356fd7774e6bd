"""Native CUDA kernels over those in Triton and the portable ones, where they have been built.

They implement the same native ops as the CPU kernels, for CUDA tensors, in a library of their own.
Loading it needs no GPU and no driver. Each kernel is checked at its first call on a device, see
:mod:`efficient_attn.ops.checked`, and what it does not cover goes to what answered before it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from efficient_attn.ops import cuda_decode, native
from efficient_attn.ops.checked import Candidate, CheckedKernel

LIBRARY = Path(__file__).parents[1] / "_C_cuda.abi3.so"
KEY = "CUDA"

_refusal: str | None = "not asked for yet"
_active: CudaKernels | None = None

# Levels and bins for which csrc/common/segment_sort.h finds memory on every device, and dims whose
# normals fit into what a block has without asking.
_MOST_LEVELS, _MOST_BINS, _MOST_DIM = 24, 2**13 + 1, 512
_MOST_TOKENS = 2**30
_TOKEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _lsh_codes_covers(
    x: Tensor, normals: Tensor, bits: int, center: bool, leaf: int, first: int, own: bool
) -> bool:
    # Both are read 16 bytes at a time.
    steps = (n * x.itemsize for n in (*x.stride()[:-1], x.shape[-1]))
    starts = (normals.data_ptr(), x.data_ptr(), *steps)
    return (
        x.dtype in _TOKEN_DTYPES
        and 0 < x.shape[-1] <= _MOST_DIM
        and x.stride(-1) == 1
        and all(start % 16 == 0 for start in starts)
        and x.shape[2] + abs(first) < _MOST_TOKENS
        and leaf < _MOST_TOKENS
    )


def _lsh_codes_sample(device: torch.device) -> tuple:
    # Small whole numbers, whose products are exact in every precision. A mean of leaves is whole,
    # and equal to a projection, only where it is exact, too.
    def numbers(*shape):
        count = torch.arange(torch.Size(shape).numel(), device=device)
        return count.mul(40503).remainder(2**16).remainder(7).sub(3).view(shape)

    return numbers(1, 2, 300, 24).bfloat16(), numbers(24, 16).float(), 9, True, 140, -30, True


def _segment_order_covers(
    codes: Tensor, bins: int, sizes: list[int], tokens: int, first: int
) -> bool:
    few = 0 < len(sizes) <= _MOST_LEVELS and bins <= _MOST_BINS
    return few and codes.shape[-1] + abs(first) < _MOST_TOKENS


def _segment_order_sample(device: torch.device) -> tuple:
    # More rows than one block sorts.
    codes = torch.arange(2 * 9000, device=device).mul(40503).remainder(2**16).remainder(37)
    return codes.int().view(1, 2, 9000), 37, [3000, 700], 4500, -100


CANDIDATES = (
    Candidate(
        "attention_decode",
        cuda_decode.attention_decode_covers,
        cuda_decode.attention_decode_sample,
        cuda_decode.agrees,
    ),
    Candidate(
        "mla_decode",
        cuda_decode.mla_decode_covers,
        cuda_decode.mla_decode_sample,
        cuda_decode.agrees,
    ),
    Candidate("lsh_codes", _lsh_codes_covers, _lsh_codes_sample, torch.equal),
    Candidate("segment_order", _segment_order_covers, _segment_order_sample, torch.equal),
)


class CudaKernels:
    """The CUDA kernels in use; ``remove()`` gives the ops back to those that answered before."""

    def __init__(self) -> None:
        self._kernels = {
            candidate.name: CheckedKernel(candidate, native.native_op(candidate.name), KEY)
            for candidate in CANDIDATES
        }

    def refusal(self, name: str) -> str | None:
        """Why the kernel of an op is no longer used, or ``None`` if it is."""
        return self._kernels[name].refusal

    def remove(self) -> None:
        """Unregister all of them; calling it again does nothing."""
        global _active
        if _active is self:
            _active = None
        for kernel in self._kernels.values():
            kernel.remove()


def status(name: str | None = None) -> str | None:
    """Why the CUDA kernels, or the one of an op, cannot be used; ``None`` if they can."""
    if _refusal is None and name is not None and _active is not None:
        return _active.refusal(name)
    return _refusal


def use_cuda() -> CudaKernels:
    """Put the CUDA kernels in place, and return the handle that removes them.

    Raises:
        RuntimeError: They cannot be used, with the reason that :func:`status` gives.
    """
    global _active
    if _refusal is not None:
        raise RuntimeError(f"the CUDA kernels cannot be used: {_refusal}.")
    if _active is None:
        _active = CudaKernels()
    return _active


def activate() -> None:
    """Load and use the library if there is one; called once, after ``native.activate``."""
    global _refusal
    try:
        _refusal = _load()
    except Exception as error:  # Whatever a binary does wrong, the package has to import.
        _refusal = f"{LIBRARY.name} was refused: {error}"
    if _refusal is None:
        use_cuda()


def _load() -> str | None:
    """Load the library; returns why it cannot be used, or ``None``."""
    if not LIBRARY.exists():
        return (
            "not built; where nvcc is found, run `make clean native` in a checkout, or install "
            "with EFFICIENT_ATTN_BUILD_NATIVE=1 and --no-build-isolation"
        )
    if native.status() is not None:
        return f"the CPU kernels, which belong to it, cannot be used: {native.status()}"
    torch.ops.load_library(LIBRARY)
    for candidate in CANDIDATES:
        name = f"efficient_attn_native::{candidate.name}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, KEY):
            return f"{LIBRARY.name} is of another version: it has no {candidate.name}"
    return None
