"""The CUDA library without a device: that it loads, what it registers, what its kernels use.

What the kernels compute is tested on an emulated machine (test_planning.py), and on a device by the
tests that are marked `gpu`.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from efficient_attn.ops import cuda, native

ARCHITECTURES = ("sm_80", "sm_90a")
# Registers that each kernel may use on them. Nothing may spill; shared memory comes at launch.
REGISTERS = {
    "DecodeBlock": (224, 224),
    "LatentBlock": (255, 255),
    "ProjectBlock": (80, 80),
    "MeansBlock": (64, 64),
    "CodesBlock": (80, 80),
    "SortBlock": (64, 64),
}


@pytest.fixture(scope="module")
def library():
    """The library, which has to be there where native code is required and nvcc is at hand."""
    if cuda.status() is not None:
        required = os.environ.get("EFFICIENT_ATTN_REQUIRE_NATIVE") == "1" and shutil.which("nvcc")
        if required and os.environ.get("EFFICIENT_ATTN_BUILD_CUDA", "1") != "0":
            pytest.fail(f"nvcc is here, but {cuda.status()}")
        pytest.skip(cuda.status())
    return cuda.LIBRARY


@pytest.fixture(scope="module")
def usage(library):
    """What each kernel uses on each architecture, for each data type, as the binary says."""
    triton = Path(pytest.importorskip("triton", reason="cuobjdump comes with it").__file__).parent
    cuobjdump = shutil.which("cuobjdump", path=triton / "backends" / "nvidia" / "bin")
    done = subprocess.run(
        [cuobjdump, "--dump-resource-usage", library], capture_output=True, text=True, check=True
    )
    usage, arch = {}, None
    for line in done.stdout.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r" Function .*run_blockI\w*?\d+([A-Za-z]+Block)", line):
            kernel = found[1]
        elif line.startswith("  REG:"):
            used = (pair.split(":") for pair in line.split())
            usage.setdefault((kernel, arch), []).append({x: int(number) for x, number in used})
    return usage


def test_it_loads_and_registers_without_a_device(library):
    for candidate in cuda.CANDIDATES:
        for namespace in ("efficient_attn_native", "efficient_attn"):
            name = f"{namespace}::{candidate.name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
        assert cuda.status(candidate.name) is None


def test_no_library_of_cuda_has_to_be_there_to_load_it(library):
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert "libtorch_cpu" in needed.stdout
    assert not re.search(r"NEEDED.*(cuda|nv)", needed.stdout)


def test_every_kernel_is_there_for_every_architecture(usage):
    assert set(usage) == {(kernel, arch) for kernel in REGISTERS for arch in ARCHITECTURES}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", REGISTERS)
def test_kernels_stay_in_their_registers(usage, kernel, arch):
    for used in usage[kernel, arch]:
        assert used["STACK"] == used["LOCAL"] == 0, "something spills"
        assert used["REG"] <= REGISTERS[kernel][ARCHITECTURES.index(arch)]
        # The driver keeps 1 KiB for itself from compute capability 9.0 on.
        assert used["SHARED"] <= 1024


def test_the_handle_removes_and_restores(library):
    name = "efficient_attn::segment_order"

    def registered():
        return re.search(r"^CUDA: .*checked\.py", torch._C._dispatch_dump(name), re.MULTILINE)

    handle = cuda.use_cuda()
    try:
        assert registered() and cuda.use_cuda() is handle
        handle.remove()
        assert not registered() and handle.refusal("segment_order") == "removed"
        handle.remove()
    finally:
        again = cuda.use_cuda()
    assert registered() and again is not handle and cuda.status("segment_order") is None


def test_without_its_cpu_kernels_it_is_refused(library, monkeypatch):
    monkeypatch.setattr(native, "_refusal", "broken")
    assert "broken" in cuda._load()
