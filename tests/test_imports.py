"""What importing the package costs, and what it must get along without."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import efficient_attn

HEAVY = ["triton", "transformers", "timm", "vllm", "matplotlib", "pandas", "tokenizers"]


def run(script):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_package_works_without_anything_heavy():
    run(f"""
import sys
for name in {[*HEAVY, "typer", "rich", "tqdm", "safetensors"]!r}:
    sys.modules[name] = None
import torch, efficient_attn as ea
query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
assert ea.attention(query, key, value, causal=True).shape == query.shape
from efficient_attn.layers import GroupedQueryAttention
""")


def test_importing_the_package_imports_nothing_heavy():
    # What torch loads of its own accord is not ours; its FLOP counter, which ops use, loads triton.
    loaded = run(f"""
import sys, torch, torch.utils.flop_counter
before = set(sys.modules)
import efficient_attn
print(*(set({HEAVY!r}) & (set(sys.modules) - before)))
""")
    assert loaded == []


def public_modules():
    names = [efficient_attn.__name__]
    for info in pkgutil.walk_packages(efficient_attn.__path__, "efficient_attn."):
        private = any(part.startswith("_") for part in info.name.split("."))
        # Kernels are nobody's to call, and some need triton.
        if not private and ".kernels" not in info.name:
            names.append(info.name)
    return names


@pytest.mark.parametrize("name", public_modules())
def test_every_public_name_is_documented(name):
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    undocumented = []
    for public_name in public:
        thing = getattr(module, public_name)
        own = getattr(thing, "__module__", "").startswith("efficient_attn")
        callable_ = inspect.isclass(thing) or inspect.isfunction(thing)
        if callable_ and own and not inspect.getdoc(thing):
            undocumented.append(public_name)
    assert not undocumented


def test_what_the_package_exports_exists_and_is_sorted():
    assert list(efficient_attn.__all__) == sorted(efficient_attn.__all__)
    for name in efficient_attn.__all__:
        assert hasattr(efficient_attn, name)
