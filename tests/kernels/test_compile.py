"""Compile the Triton kernels for devices that are not here, without the interpreter."""

import os
import subprocess
import sys

import pytest

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
