"""What the device can do at best, measured in the run whose numbers are held against it."""

from __future__ import annotations

import torch

from bench.measure import Clock
from bench.workloads import DTYPES

COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
READ_BYTES = {"cpu": 2**28, "cuda": 2**31}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
# Rows of 256 bytes are what gathering one bf16 head of width 128 reads.
GATHER_ROW = 256
GATHER_ROWS = {"cpu": 2**17, "cuda": 2**22}
ROUNDS, CALLS = 3, 2


def measure_ceilings(device: str, clock: Clock, dtypes: list[str]) -> dict:
    """Copy and read bandwidth and matrix products, best of a few rounds, as a record.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        clock: The device's clock.
        dtypes: Which matrix products to time.

    Returns:
        ``copy_bytes_per_second`` (read plus write), ``read_bytes_per_second`` and
        ``matmul_flops_per_second`` by dtype.
    """
    return {
        "kind": "ceilings",
        "copy_bytes_per_second": _copy(device, clock),
        "read_bytes_per_second": _read(device, clock),
        "matmul_flops_per_second": {dtype: _matmul(device, clock, dtype) for dtype in dtypes},
    }


def _copy(device: str, clock: Clock) -> float:
    source = torch.randn(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / _best(clock, lambda: target.copy_(source))


def _read(device: str, clock: Clock) -> float:
    """By what torch reads fastest with: which one that is depends on the machine."""
    source = torch.ones(READ_BYTES[device] // 4, device=device)
    readers = (source.sum, source.norm, source.view(torch.int32).amax)
    return READ_BYTES[device] / min(_best(clock, reader) for reader in readers)


def _matmul(device: str, clock: Clock, dtype: str) -> float:
    size = MATMUL_SIZE[device]
    left, right = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _best(clock, lambda: torch.mm(left, right, out=out))


def measure_gather(device: str, clock: Clock) -> dict:
    """Bandwidth of copying random rows (read plus write), by a Triton kernel on CUDA."""
    rows = GATHER_ROWS[device]
    source = torch.randn(rows, GATHER_ROW // 2, device=device).to(torch.bfloat16)
    index = torch.randperm(rows, device=device).to(torch.int32)
    target = torch.empty_like(source)
    if device == "cuda":
        from bench.gather_kernel import gather_rows
    else:

        def gather_rows(source, index, target):
            torch.index_select(source, 0, index, out=target)

    gather_rows(source, index, target)
    if not torch.equal(target, source[index.long()]):
        raise RuntimeError("the gather kernel copied wrong rows; its bandwidth means nothing.")
    seconds = _best(clock, lambda: gather_rows(source, index, target))
    return {"kind": "gather", "gather_bytes_per_second": 2 * rows * GATHER_ROW / seconds}


def _best(clock: Clock, step) -> float:
    step()
    return min(clock.sample(step, CALLS) for _ in range(ROUNDS))
