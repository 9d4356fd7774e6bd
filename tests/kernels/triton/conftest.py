"""On a GPU these tests run the kernels there; elsewhere, under Triton's interpreter, mended."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker("gpu")


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter():
    """Make Triton's interpreter multiply bfloat16, and twice as fast."""
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    thorough = interpreter.InterpretedFunction.__call__
    dot = interpreter.InterpreterBuilder.create_dot

    def call(self, *args, **kwargs):
        # The launch of a kernel has patched triton.language; to look for more to patch at every
        # call of a device function takes longer than to run it.
        if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
            return thorough(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    def create_dot(self, a, b, *args):
        # bfloat16 is kept as uint16 there, and multiplied as such.
        return dot(self, widened(a), widened(b), *args)

    def widened(x):
        if x.dtype != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield
