"""Compile the Triton kernels for devices that are not here, without the interpreter."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to compile without triton")


def test_kernels_compile_without_spilling_for_every_architecture():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "efficient_attn.kernels.triton.compile_check"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


GOOD = {"shared": 1 << 16, "tmem_size": 512}


@pytest.mark.parametrize(
    ("arch", "metadata", "ptx", "spilled", "in_loops", "expected"),
    [
        ("sm90", GOOD, "wgmma.mma_async", 8, 0, None),
        ("sm80", GOOD, "mma.sync", 0, 0, None),
        ("sm90", GOOD, "", 0, 0, "has no wgmma.mma_async"),
        ("sm90", GOOD, "wgmma.mma_async mma.sync", 0, 0, "has a synchronous matmul"),
        ("sm100", GOOD, "wgmma.mma_async", 0, 0, "has no tcgen05.mma"),
        ("sm100", {**GOOD, "tmem_size": 513}, "tcgen05.mma", 0, 0, "tensor memory"),
        ("sm80", {**GOOD, "shared": 1 << 18}, "mma.sync", 0, 0, "bytes of shared memory"),
        ("sm80", GOOD, "mma.sync", 4000, 0, "spills more than"),
        ("sm80", GOOD, "mma.sync", 8, 3, "3 instructions in loops spill"),
    ],
)
def test_what_a_kernel_may_not_do(arch, metadata, ptx, spilled, in_loops, expected, monkeypatch):
    compile_check = pytest.importorskip("efficient_attn.kernels.triton.compile_check")
    monkeypatch.setattr(compile_check, "_registers_and_spills", lambda cubin: (99, spilled))
    monkeypatch.setattr(compile_check, "_spills_in_loops", lambda cubin: in_loops)
    asm = {"cubin": b"", "ptx": ptx, "ttir": "%2 = tt.dot %0, %1 -> tensor<64x128xf32>"}
    kernel = SimpleNamespace(asm=asm, metadata=SimpleNamespace(**metadata))
    case = compile_check.Case(arch, (64, 64), torch.bfloat16)
    failures = compile_check._judge(case, "_forward_kernel", kernel).failures
    assert not failures if expected is None else len(failures) == 1 and expected in failures[0]


def test_the_few_rows_of_decoding_need_no_asynchronous_matmul(monkeypatch):
    compile_check = pytest.importorskip("efficient_attn.kernels.triton.compile_check")
    monkeypatch.setattr(compile_check, "_registers_and_spills", lambda cubin: (99, 0))
    asm = {"cubin": b"", "ptx": "mma.sync", "ttir": "%2 = tt.dot %0, %1 -> tensor<16x128xf32>"}
    kernel = SimpleNamespace(asm=asm, metadata=SimpleNamespace(**GOOD))
    case = compile_check.Case("sm90", (64, 64), torch.bfloat16)
    assert not compile_check._judge(case, "_decode_kernel", kernel).failures
