"""The one owner of the ``efficient_attn`` operator library.

An op file states a schema, a fake, a gradient and a FLOP count; this file is how they reach the
dispatcher. Kernels are named by dotted path and imported at their first call, so that importing the
package pulls in neither triton nor a binary.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "efficient_attn"
library = torch.library.Library(NAMESPACE, "DEF")

TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None

_implementations: dict[tuple[str, str], Callable] = {}


def define(schema: str) -> None:
    """Add an op by its schema, for example ``"merge_states(Tensor[] outs, ...) -> ..."``."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str, dispatch_key: str, path: str) -> None:
    """Answer ``name`` on ``dispatch_key`` by ``"module:function"``, imported at the first call."""
    module, _, function = path.partition(":")
    loaded: list[Callable] = []

    def call(*args):
        if not loaded:
            loaded.append(getattr(importlib.import_module(module), function))
        return loaded[0](*args)

    library.impl(name, call, dispatch_key)
    _implementations[name, dispatch_key] = call


def implementation(name: str, dispatch_key: str) -> Callable:
    """What :func:`implement` has made the answer of ``name`` on ``dispatch_key``."""
    portable = _implementations[name, "CompositeExplicitAutograd"]
    return _implementations.get((name, dispatch_key), portable)


def fake(name: str) -> Callable:
    """Register the decorated function as the shape function of ``name``."""
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=library)


def differentiate(name: str, backward: Callable, setup_context: Callable) -> None:
    """Register the gradient of ``name``."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library
    )


def autocast(name: str, num_cast: int) -> None:
    """Under autocast, call ``name`` with its first ``num_cast`` arguments in the autocast dtype."""
    op = getattr(torch.ops.efficient_attn, name)
    for key in ("CPU", "CUDA"):
        device = key.lower()

        def call(*args, device=device):
            dtype = torch.get_autocast_dtype(device)
            cast = (_to_autocast_dtype(x, dtype) for x in args[:num_cast])
            with torch.autocast(device, enabled=False):
                return op(*cast, *args[num_cast:])

        library.impl(name, call, f"Autocast{key}")


def _to_autocast_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch's own attention does, double precision is left alone.
    return x if x.dtype == torch.float64 else x.to(dtype)
