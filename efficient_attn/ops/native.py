"""Native CPU kernels in the place of the portable ones, where they have been built.

The binary registers its ops in a namespace of its own, under the names and schemas of the ops they
answer. It is trusted only after its schemas have been compared and each op has reproduced the
portable result of a small sample. A binary that is missing, broken or of another version changes
nothing but the answer of :func:`status`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from efficient_attn.config import HyperConfig
from efficient_attn.planning import make_plan

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"

_refusal: str | None = "not asked for yet"
_active: NativeKernels | None = None


def _merge_states_sample() -> tuple:
    outs = [torch.linspace(-1 - part, 1, 22, device="cpu").view(2, 11) for part in range(3)]
    lses = [torch.tensor([float(part), -torch.inf], device="cpu") for part in range(3)]
    return outs, lses


def _wave(*shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32, device="cpu").mul(0.7).sin().view(shape)


def _attention_decode_sample() -> tuple:
    lengths = torch.tensor([70, 3], device="cpu")
    q_to_k, q_to_v = (torch.tensor(x, device="cpu") for x in ([1, 0, 1], [0, 1, 1]))
    caches = _wave(2, 2, 80, 33), _wave(2, 2, 80, 9)
    return _wave(2, 3, 2, 33), *caches, lengths, None, q_to_k, q_to_v, 65, 0.5, 3.0


def _mla_decode_sample() -> tuple:
    lengths, table = (torch.tensor(x, device="cpu") for x in ([70, 3], [[2, 1, 4], [3, 0, 0]]))
    return _wave(2, 5, 1, 20), _wave(2, 5, 1, 4), _wave(5, 32, 24), lengths, table, 0.3


def _hyper_attention_sample() -> tuple:
    query, key, value = _wave(1, 2, 70, 9), _wave(1, 1, 90, 9).cos(), _wave(1, 1, 90, 20)
    config = HyperConfig(
        block_size=8, sample_size=4, leaf_size=16, window=8, sinks=2, exact_below=2
    )
    return query, key, value, *make_plan(query, key, causal=True, config=config, seed=0), 0.4


def _hyper_attention_backward_sample() -> tuple:
    inputs = _hyper_attention_sample()
    out, lse = torch.ops.efficient_attn.hyper_attention(*inputs)
    return out.cos(), lse.cos(), *inputs[:3], out, lse, *inputs[3:]


def _lsh_codes_sample() -> tuple:
    return _wave(2, 2, 70, 9), _wave(9, 16).cos(), 5, True, 16, -7, False


def _segment_order_sample() -> tuple:
    codes = torch.arange(2 * 3 * 80, dtype=torch.int32, device="cpu").view(2, 3, 80)
    return codes * 37 % 11, 11, [16, 40], 40, 7


def _selective_decode_sample() -> tuple:
    return *_attention_decode_sample(), 9, 0.0


# Every native op, with arguments on which it has to agree with the portable one.
_SAMPLES = {
    "merge_states": _merge_states_sample,
    "attention_decode": _attention_decode_sample,
    "mla_decode": _mla_decode_sample,
    "hyper_attention": _hyper_attention_sample,
    "hyper_attention_backward": _hyper_attention_backward_sample,
    "lsh_codes": _lsh_codes_sample,
    "segment_order": _segment_order_sample,
    "selective_decode": _selective_decode_sample,
}


class NativeKernels:
    """The native kernels in use; ``remove()`` gives the ops back to the portable ones."""

    def __init__(self) -> None:
        self._library = torch.library.Library("efficient_attn", "IMPL")
        for name in _SAMPLES:
            self._library.impl(name, native_op(name), "CPU")

    def remove(self) -> None:
        """Unregister; calling it again does nothing."""
        global _active
        if _active is self:
            _active = None
        self._library._destroy()


def status() -> str | None:
    """Why the native kernels cannot be used, or ``None`` if they can."""
    return _refusal


def use_native() -> NativeKernels:
    """Put the native kernels in place, and return the handle that removes them.

    Raises:
        RuntimeError: They cannot be used, with the reason that :func:`status` gives.
    """
    global _active
    if _refusal is not None:
        raise RuntimeError(f"the native kernels cannot be used: {_refusal}.")
    if _active is None:
        _active = NativeKernels()
    return _active


def activate() -> None:
    """Load, check and use the binary if there is one; called once, when the ops are imported."""
    global _refusal
    try:
        _refusal = _load()
    except Exception as error:  # Whatever a binary does wrong, the package has to import.
        _refusal = f"{LIBRARY.name} was refused: {error}"
    if _refusal is None:
        use_native()


def _load() -> str | None:
    """Load and check the binary; returns why it cannot be used, or ``None``."""
    if not LIBRARY.exists():
        return (
            "not built; in a checkout run `make native`, otherwise install with "
            "EFFICIENT_ATTN_BUILD_NATIVE=1 and --no-build-isolation"
        )
    torch.ops.load_library(LIBRARY)
    for name, sample in _SAMPLES.items():
        op = getattr(torch.ops.efficient_attn, name).default
        ours, theirs = (str(x._schema).partition("::")[2] for x in (op, native_op(name)))
        if ours != theirs:
            return f"{LIBRARY.name} is of another version: it has {theirs} for {ours}"
        with torch.no_grad():
            expected, actual = (_several(x(*sample())) for x in (op, native_op(name)))
        if not all(map(_agree, actual, expected)):
            return f"{LIBRARY.name} computes {name} wrongly on this machine"
    return None


def native_op(name: str) -> torch._ops.OpOverload:
    """The native op of this name, which the binaries register."""
    return getattr(torch.ops.efficient_attn_native, name).default


def _several(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _agree(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)
