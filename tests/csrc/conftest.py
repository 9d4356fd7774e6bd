"""The native code, or a skip that says why it is not there."""

import importlib
import os

import pytest

from efficient_attn.ops import cuda, native
from tests.csrc.cuda_machines import Machine

REQUIRED = os.environ.get("EFFICIENT_ATTN_REQUIRE_NATIVE") == "1"


@pytest.fixture
def use_native():
    """The native kernels in use, whatever the test does to them."""
    if native.status() is not None and not REQUIRED:
        pytest.skip(native.status())
    yield native.use_native()
    native.use_native()


@pytest.fixture
def host():
    """The doors into the tensor-free part of the native code."""
    if importlib.util.find_spec("efficient_attn._host") is None and not REQUIRED:
        pytest.skip("efficient_attn._host is not built; run `make native`")
    return importlib.import_module("efficient_attn._host")


@pytest.fixture
def emulated():
    """The ops that run CUDA kernels on an emulated machine, which are part of the native code."""
    if native.status() is not None and not REQUIRED:
        pytest.skip(native.status())


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request):
    """Every machine that runs CUDA kernels of attention to a cache: the emulated one, a device."""
    request.getfixturevalue("emulated")
    if request.param == "cuda" and cuda.status() is not None and not REQUIRED:
        pytest.skip(cuda.status())
    return Machine("cuda" if request.param == "cuda" else "cpu")
