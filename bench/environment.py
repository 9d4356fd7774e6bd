"""Where numbers were taken: everything that may explain them, nothing that names a machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from efficient_attn import diagnostics

ROOT = Path(__file__).resolve().parent.parent

# glibc returns large blocks to the kernel at every free, and a page fault costs more than the
# arithmetic on virtual machines. Keeping the pages takes that out of every provider's time alike.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def describe(device: str) -> dict:
    """The environment record of a results file."""
    status = _output("git", "status", "--porcelain")
    record = {
        "device": device_name(device),
        "device_kind": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD"),
        "dirty": None if status is None else bool(status),
        "threads": torch.get_num_threads(),
        "kernels": answering(device),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "clocks": clocks(),
        }
    return record


def answering(device: str) -> dict[str, str]:
    """The first implementation of the package that each op asks on a kind of device."""
    return {
        op: next(entry["name"] for entry in by_device[device] if entry["answers"])
        for op, by_device in diagnostics.report()["kernels"].items()
    }


def device_name(device: str) -> str:
    """The model of the device."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def clocks() -> dict[str, str] | None:
    """Driver, present clocks and power of the first GPU; ``None`` if the tool is missing."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw"]
    fields += ["power.limit", "temperature.gpu"]
    line = _output(
        "nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"
    )
    return dict(zip(fields, line.split(", "), strict=False)) if line else None


def without_paths(text: str) -> str:
    """A message fit for a results file: absolute paths are replaced by the name at their end."""
    return re.sub(r"(?<![\w.])(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", text)


def keep_pages() -> None:
    """Run this process again with ``ALLOCATOR`` set, unless it is; glibc reads it only at start."""
    if sys.platform != "linux" or all(name in os.environ for name in ALLOCATOR):
        return
    arguments = [sys.executable, "-m", "bench", *sys.argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, **ALLOCATOR})


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
