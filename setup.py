"""Build script: a pure wheel by default, native code when it is asked for.

Everything that can be said in data is in pyproject.toml. What is left is the native part, which is
compiled only under ``EFFICIENT_ATTN_BUILD_NATIVE=1``, because it needs the torch of the target
environment; without it this file imports nothing but setuptools.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
# Tensors cross through torch's stable ABI alone; this is the oldest torch the binary loads into.
TORCH_TARGET = "0x020a000000000000"
# Newer devices compile what is written for the first when they load it.
CUDA_ARCHITECTURES = "8.0+PTX;9.0a"
GIGABYTES_PER_JOB = 2


def native_build() -> dict:
    """The arguments of ``setup`` that compile csrc/, or a clear exit where that is impossible."""
    try:
        import pybind11
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(
            f"EFFICIENT_ATTN_BUILD_NATIVE=1, but {error.name} cannot be imported in the build "
            "environment. pip isolates builds by default; install the build requirements and "
            "switch that off:\n"
            "    pip install torch pybind11 ninja setuptools\n"
            "    EFFICIENT_ATTN_BUILD_NATIVE=1 pip install --no-build-isolation ."
        )
    os.environ.setdefault("MAX_JOBS", str(job_count()))
    print(f"building native code with MAX_JOBS={os.environ['MAX_JOBS']}", file=sys.stderr)

    flags = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    flags += ["-Wno-unknown-pragmas"]  # what nvcc is told to unroll, in kernels that are emulated
    stable = ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    include = [str(HERE / "csrc")]
    home = cuda_home()
    extensions = [
        cpp_extension.CppExtension(
            "efficient_attn._C",
            [
                *sources("csrc/*.cpp"),
                *sources("csrc/cpu/*.cpp"),
                *sources("csrc/emulated/*.cpp"),
            ],
            include_dirs=include,
            extra_compile_args=[*flags, *stable],
            py_limited_api=True,
        ),
        # Plain setuptools: this one holds no tensors and must not be bound to a torch.
        Extension(
            "efficient_attn._host",
            sources("csrc/host/*.cpp"),
            include_dirs=[*include, pybind11.get_include()],
            language="c++",
            extra_compile_args=[
                *flags,
                f'-DEA_FLAGS="{" ".join(flags)}"',
                f"-DEA_TORCH_TARGET={TORCH_TARGET}",
                f"-DEA_WITH_CUDA={int(home is not None)}",
            ],
        ),
    ]
    if home:
        cpp_extension.CUDA_HOME = str(home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        extensions.append(
            cpp_extension.CppExtension(
                "efficient_attn._C_cuda",
                [*sources("csrc/cuda/*.cpp"), *sources("csrc/cuda/*.cu")],
                include_dirs=include,
                # The runtime is linked statically, so that the library loads where there is none.
                library_dirs=[str(home / "lib64"), str(home / "lib")],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                extra_compile_args={
                    "cxx": [*flags, *stable],
                    "nvcc": ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", *stable],
                },
                py_limited_api=True,
            )
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


def cuda_home() -> Path | None:
    """The CUDA toolkit to build csrc/cuda with, or None where there is none or none is wanted.

    A CPU build of torch does not look for one; its stable headers compile with nvcc all the same.
    """
    if os.environ.get("EFFICIENT_ATTN_BUILD_CUDA", "1") == "0":
        return None
    if asked_for := os.environ.get("CUDA_HOME"):
        nvcc = shutil.which("nvcc", path=f"{asked_for}/bin")
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    # What is called nvcc may be a script that starts another; the compiler knows where it is.
    plan = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"TOP=(.*)", plan.stderr)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).parents[1]


def sources(pattern: str) -> list[str]:
    """Files below this folder, relative to it as setuptools wants them."""
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern))


def job_count() -> int:
    """As many compilers as there are cores and memory for."""
    cores = os.cpu_count() or 1
    if platform.system() != "Linux":
        return cores
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(cores, int(free / GIGABYTES_PER_JOB)))


setup(**(native_build() if os.environ.get("EFFICIENT_ATTN_BUILD_NATIVE", "0") == "1" else {}))
