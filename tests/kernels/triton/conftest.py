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
    """Make the interpreter multiply bfloat16, refuse stray addresses, and run twice as fast."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        _find_patched_language_once(patch, interpreter)
        _multiply_bfloat16(patch, interpreter.InterpreterBuilder)
        _refuse_stray_addresses(patch, interpreter)
        yield


def _find_patched_language_once(patch, interpreter):
    """A launch has patched the language; looking for it again at every call takes longest."""
    import triton.language as tl

    thorough = interpreter.InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
            return thorough(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    patch.setattr(interpreter.InterpretedFunction, "__call__", call)


def _multiply_bfloat16(patch, builder):
    """The interpreter keeps bfloat16 as uint16 and multiplies it as such."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    dot = builder.create_dot

    def widened(x):
        if x.dtype != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    patch.setattr(
        builder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


def _refuse_stray_addresses(patch, interpreter):
    """A load or store outside of the tensors that a kernel was given fails the test."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, to_host = (
        builder.create_masked_load,
        builder.create_masked_store,
        executor._init_args_hst,
    )
    allowed = []

    def remember(self, args, kwargs):
        args, kwargs = to_host(self, args, kwargs)
        allowed.clear()
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor) and x.numel():
                last = sum(
                    (size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)
                )
                allowed.append((x.data_ptr(), x.data_ptr() + last * x.itemsize))
        return args, kwargs

    def check(pointers, mask):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if addresses.size:
            low, high = int(addresses.min()), int(addresses.max())
            # A tile belongs to one tensor, so its extremes do.
            assert any(first <= low and high <= last for first, last in allowed), "a stray address"

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    patch.setattr(executor, "_init_args_hst", remember)
    patch.setattr(builder, "create_masked_load", checked_load)
    patch.setattr(builder, "create_masked_store", checked_store)
