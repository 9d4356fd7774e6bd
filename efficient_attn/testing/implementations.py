"""One implementation of an op, whichever of them answers calls."""

from __future__ import annotations

from collections.abc import Callable

from efficient_attn.ops import _register, cuda, native


def implementation(op: str, device: str, *, is_native: bool) -> Callable:
    """The native kernel of an op, or what answers where there is none.

    Args:
        op: Its name, for example ``"attention_decode"``.
        device: ``"cpu"`` or ``"cuda"``.
        is_native: Whether it is that in ``csrc/``.

    Returns:
        A function of the arguments of the op, in their order.

    Raises:
        RuntimeError: There is no native kernel, with the reason.
    """
    if not is_native:
        return _register.implementation(op, device.upper())
    reason = cuda.status(op) if device == "cuda" else native.status()
    if reason is not None:
        raise RuntimeError(f"there is no native kernel of {op}: {reason}.")
    return native.native_op(op)
