"""What is built from a checkout, without a network and without torch at hand."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# setuptools' own entry points, called as pip calls them, where torch and its tools do not exist.
BUILD = """
import sys
for name in ("torch", "pybind11", "triton", "numpy"):
    sys.modules[name] = None
from setuptools import build_meta
print(build_meta.build_{kind}(sys.argv[1]))
"""


def build(kind, checkout, out, **environment):
    return subprocess.run(
        [sys.executable, "-c", BUILD.format(kind=kind), str(out)],
        cwd=checkout,
        env={**os.environ, "EFFICIENT_ATTN_BUILD_NATIVE": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy to build in, with a stale native library as a developer's checkout has it."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "examples")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "efficient_attn" / "_C.abi3.so").write_bytes(b"stale")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    done = build("wheel", checkout, out)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield path.name, archive


def test_the_wheel_is_pure_and_holds_the_package_alone(wheel):
    name, archive = wheel
    assert re.fullmatch(r"efficient_attn-\d+\.\d+\.\d+-py3-none-any\.whl", name)
    names = set(archive.namelist())
    assert "efficient_attn/py.typed" in names
    tops = {entry.split("/")[0] for entry in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"efficient_attn"}
    assert not [entry for entry in names if entry.endswith((".so", ".cpp", ".h", ".pyc"))]


def test_the_wheel_holds_every_module(wheel, checkout):
    _, archive = wheel
    modules = {str(p.relative_to(checkout)) for p in (checkout / "efficient_attn").rglob("*.py")}
    assert modules == {entry for entry in archive.namelist() if entry.endswith(".py")}


def test_metadata(wheel):
    _, archive = wheel

    def read(suffix):
        (name,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{suffix}"))
        return archive.read(name).decode()

    metadata = email.message_from_string(read("METADATA"))
    assert metadata["Requires-Python"] == ">=3.10" and metadata["License-Expression"] == "MIT"
    requirements = metadata.get_all("Requires-Dist")
    always = [r for r in requirements if "extra ==" not in r]
    assert "torch>=2.10" in always
    # Triton comes with the builds of torch that need it; none of these may become mandatory.
    named = {re.match(r"[\w.-]+", r).group().lower() for r in always}
    assert not named & {"triton", "transformers", "ninja", "pybind11", "matplotlib", "pandas"}
    assert set(metadata.get_all("Provides-Extra")) == {"hf", "bench", "dev"}
    assert "efficient-attn = efficient_attn.cli:app" in read("entry_points.txt")


def test_the_sdist_holds_what_the_native_build_and_the_tests_need(checkout, tmp_path):
    done = build("sdist", checkout, tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {str(p.relative_to(checkout)) for p in (checkout / "csrc").rglob("*") if p.is_file()}
    assert native <= names
    assert {"setup.py", "constraints.txt", "LICENSE", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_a_native_build_without_torch_says_what_to_type(checkout, tmp_path):
    done = build("wheel", checkout, tmp_path, EFFICIENT_ATTN_BUILD_NATIVE="1")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "EFFICIENT_ATTN_BUILD_NATIVE=1 pip install --no-build-isolation ." in done.stderr


# The extensions that setup.py would build, and where they look for libraries.
EXTENSIONS = """
import json, runpy, setuptools
def setup(ext_modules=(), **rest):
    print(json.dumps({x.name: x.library_dirs for x in ext_modules}))
setuptools.setup = setup
runpy.run_path("setup.py", run_name="__main__")
"""


def extensions(**environment):
    done = subprocess.run(
        [sys.executable, "-c", EXTENSIONS],
        cwd=ROOT,
        env={**os.environ, "EFFICIENT_ATTN_BUILD_NATIVE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["CUDA_HOME", "EFFICIENT_ATTN_BUILD_CUDA"])
def test_a_native_build_without_nvcc_or_without_wanting_it_is_for_the_cpu(tmp_path, name):
    off = {"CUDA_HOME": str(tmp_path), "EFFICIENT_ATTN_BUILD_CUDA": "0"}
    assert set(extensions(**{name: off[name]})) == {"efficient_attn._C", "efficient_attn._host"}


def test_a_native_build_finds_the_toolkit_behind_a_script_called_nvcc(tmp_path):
    toolkit = tmp_path / "toolkit"
    nvcc = tmp_path / "home" / "bin" / "nvcc"
    for folder in (toolkit / "bin", nvcc.parent):
        folder.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    libraries = extensions(CUDA_HOME=str(tmp_path / "home"))["efficient_attn._C_cuda"]
    assert str(toolkit / "lib64") in libraries


def test_every_dependency_is_pinned_for_development():
    pinned = {
        re.match(r"[\w.-]+", line).group().lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0]
    project = project.partition("\ndependencies")[2]
    wanted = {name.lower() for name in re.findall(r'"([\w-]+)(?:[><=][^"]*)?"', project)}
    assert {"torch", "einops", "pytest", "transformers"} <= wanted <= pinned
