"""Compile every attention kernel for devices that are not here, and read what the compiler made.

No GPU is needed. The launchers run on tensors without memory, and a stand-in for the CUDA driver
names the target, so what is compiled is what a call on that device would launch. A kernel fails the
check if it does not compile, spills a register in a loop, wants more shared memory than the device
has, or (in 16 bits on Hopper and data-centre Blackwell) does a matmul without the device's
asynchronous instruction. A few registers may be put aside around the loops, where it costs nothing
and a smaller tile would cost much.

    python -m efficient_attn.kernels.triton.compile_check [--all] [--arch sm90] [--jobs 2]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from efficient_attn.kernels.triton import configs
from efficient_attn.kernels.triton.compile_cases import (
    CAPABILITY,
    Case,
    all_cases,
    call,
    representative_cases,
)

LARGEST_SPILL_AROUND_LOOPS = 320  # bytes per thread
_MATMUL = {"sm90": "wgmma.mma_async", "sm100": "tcgen05.mma"}


@dataclass(frozen=True)
class Result:
    """What became of one kernel of a case."""

    case: Case
    kernel: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    failures: tuple[str, ...] = ()

    def __str__(self) -> str:
        case = self.case
        dims = "/".join(map(str, case.dims))
        dtype = str(case.dtype).removeprefix("torch.")
        features = ",".join(sorted(case.features)) or "-"
        return (
            f"{case.arch:6}{self.kernel:20}{dims:9}{dtype:10}{features:45}{self.registers:4} "
            f"registers {self.spilled:4} B spilled {self.shared // 1024:4} KiB shared  "
            f"{'; '.join(self.failures) or 'ok'}"
        )


def check(case: Case) -> list[Result]:
    """Compile forward and backward of a case and judge each kernel."""
    try:
        kernels = _compile(case)
    except Exception as error:  # A compiler fails in many ways, and each is a result here.
        return [Result(case, "all", failures=(f"{type(error).__name__}: {error}"[:300],))]
    return [_judge(case, name, kernel) for name, kernel in kernels]


class _OfflineDriver:
    """The part of Triton's driver that compiling asks."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # Triton keeps its compiled kernels by device.

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(case: Case) -> list[tuple[str, Any]]:
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    triton.runtime.driver.set_active(_OfflineDriver(CAPABILITY[case.arch]))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(configs, "architecture", lambda device: case.arch),
    ):
        call(case)
    return kernels


def _judge(case: Case, name: str, kernel: Any) -> Result:
    registers, spilled = _registers_and_spills(kernel.asm["cubin"])
    shared, limit = kernel.metadata.shared, configs.SHARED_MEMORY[case.arch]
    failures = []
    if spilled > LARGEST_SPILL_AROUND_LOOPS:
        failures.append(f"spills more than {LARGEST_SPILL_AROUND_LOOPS} bytes")
    if spilled and (count := _spills_in_loops(kernel.asm["cubin"])):
        failures.append(f"{count} instructions in loops spill")
    if shared > limit:
        failures.append(f"wants {shared} bytes of shared memory, the device has {limit}")
    if getattr(kernel.metadata, "tmem_size", None) and kernel.metadata.tmem_size > 512:
        failures.append(f"wants {kernel.metadata.tmem_size} columns of tensor memory of 512")
    ptx, instruction = kernel.asm["ptx"], _MATMUL.get(case.arch)
    # These instructions multiply at least 64 rows; the few rows of decoding use another.
    dots = re.findall(r"tt\.dot .*-> tensor<(\d+)x", kernel.asm["ttir"])
    if instruction and case.dtype.itemsize == 2 and any(int(rows) >= 64 for rows in dots):
        if instruction not in ptx:
            failures.append(f"has no {instruction}")
        if "mma.sync" in ptx:
            failures.append("has a synchronous matmul")
    name = name.removeprefix("_").removesuffix("_kernel")
    return Result(case, name, registers, spilled, shared, tuple(failures))


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory, which only spilling takes here."""
    report = _ask("cuobjdump", "-res-usage", cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", report)
    return int(usage[1]), int(usage[2]) + int(usage[3])


def _spills_in_loops(cubin: bytes) -> int:
    """How many instructions of innermost loops store to local memory or load from it."""
    instructions, labels, loops = [], {}, []
    for line in _ask("nvdisasm", "-c", cubin).splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if target and labels[target[1]] < end:
            loops.append(range(labels[target[1]], end + 1))
    innermost = [
        x for x in loops if not any(y is not x and y[0] in x and y[-1] in x for y in loops)
    ]
    return sum(bool(re.search(r"\b(STL|LDL)\b", instructions[i])) for x in innermost for i in x)


def _ask(tool: str, option: str, cubin: bytes) -> str:
    """The report of a program that comes with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def main(arguments: Iterable[str] | None = None) -> int:
    """Print one line for each kernel; the exit status says whether all passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the whole matrix (long)")
    parser.add_argument("--arch", choices=sorted(CAPABILITY), help="one architecture only")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    chosen = parser.parse_args(arguments)
    cases = list(all_cases() if chosen.all else representative_cases())
    cases = [case for case in cases if chosen.arch in (None, case.arch)]
    failed = total = 0
    print(f"triton {triton.__version__}: {len(cases)} kinds of call")
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for results in pool.map(check, cases):
            for result in results:
                print(result, flush=True)
                total += 1
                failed += bool(result.failures)
    print(f"{total} kernels, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
