"""Loading the native binary: what is used, what is refused, and how to get rid of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import efficient_attn as ea
from efficient_attn.ops import cuda, native
from efficient_attn.testing import without_native_kernels

ROOT = Path(native.__file__).parents[2]


@pytest.mark.skipif(
    os.environ.get("EFFICIENT_ATTN_REQUIRE_NATIVE") != "1",
    reason="the native library is optional outside `make test`",
)
def test_the_library_is_there_where_it_is_required():
    assert native.status() is None


def test_the_handle_removes_and_restores(use_native):
    # What a part of weight zero holds is read by the portable kernel only.
    outs = [torch.ones(1, 4), torch.full((1, 4), torch.nan)]
    lses = [torch.zeros(1), torch.full((1,), -torch.inf)]

    def is_native():
        return not ea.merge_states(outs, lses)[0].isnan().any()

    assert is_native() and native.use_native() is use_native
    use_native.remove()
    assert not is_native()
    use_native.remove()
    again = native.use_native()
    assert is_native() and again is not use_native


def test_gradients_are_the_same_with_and_without(use_native):
    def gradients():
        torch.manual_seed(1)
        outs = [torch.randn(2, 3, 8, requires_grad=True) for _ in range(3)]
        lses = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
        out, lse = ea.merge_states(outs, lses)
        return torch.autograd.grad(out.square().sum() + lse.sum(), (*outs, *lses))

    with_native = gradients()
    use_native.remove()
    torch.testing.assert_close(with_native, gradients())


def test_everything_can_be_computed_without_native_kernels(use_native):
    outs = [torch.ones(1, 4), torch.full((1, 4), torch.nan)]
    lses = [torch.zeros(1), torch.full((1,), -torch.inf)]
    with pytest.raises(KeyError), without_native_kernels():
        assert ea.merge_states(outs, lses)[0].isnan().any()
        raise KeyError
    assert not ea.merge_states(outs, lses)[0].isnan().any()
    assert cuda.status() is not None or cuda.status("segment_order") is None


def run_with_library(folder, make_library):
    """`native.status()` of a copy of the package whose binary is what `make_library` leaves."""
    package = folder / "efficient_attn"
    shutil.copytree(
        ROOT / "efficient_attn", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    make_library(package)
    script = (
        "import torch, efficient_attn as ea; from efficient_attn.ops import native; "
        "out, _ = ea.merge_states([torch.ones(2, 3)] * 2, [torch.zeros(2)] * 2); "
        "assert (out == 1).all(); print(native.status())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_binary_the_reason_says_how_to_build_it(tmp_path):
    assert "make native" in run_with_library(tmp_path, lambda package: None)


def test_a_broken_binary_is_refused_and_the_package_works(tmp_path):
    status = run_with_library(
        tmp_path, lambda package: (package / native.LIBRARY.name).write_bytes(b"\x7fELF, not")
    )
    assert "was refused" in status


def test_a_binary_of_another_version_is_refused(tmp_path, use_native):
    def change_the_op(package):
        shutil.copy(native.LIBRARY, package)
        for path in (package / "ops" / "merge.py", package / "ops" / "native.py"):
            path.write_text(path.read_text().replace("Tensor[] outs", "Tensor[] partial_outs"))

    assert "another version" in run_with_library(tmp_path, change_the_op)


def test_a_binary_that_computes_wrongly_is_refused(tmp_path, use_native):
    def change_the_portable_kernel(package):
        shutil.copy(native.LIBRARY, package)
        path = package / "kernels" / "portable" / "merge.py"
        path.write_text(path.read_text().replace("return total", "return 1 + 0 * total"))
        # The caller of this copy asserts that merging ones gives one, which still holds.

    assert "computes merge_states wrongly" in run_with_library(tmp_path, change_the_portable_kernel)
