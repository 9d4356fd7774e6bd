"""How far a kernel may be from the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(
    actual: Tensor, truth: Tensor, plain: Tensor, *, floor: float = 1e-5, factor: float = 2.0
) -> None:
    """Assert that a kernel loses at most twice what the plain formula loses in the same precision.

    One rounding step of the largest true value is allowed besides: where there are few elements,
    the plain formula can be right by luck.

    Args:
        actual: What the kernel computed.
        truth: The reference in fp64, on the same inputs upcast.
        plain: The reference in the kernel's own dtype, on the same inputs.
        floor: Absolute error that is always allowed, relative to the largest finite true value.
        factor: The multiple of the plain formula's error.

    Raises:
        AssertionError: The error is larger, or an infinity or NaN is in the wrong place.
    """
    rounding_step = torch.finfo(actual.dtype).eps
    actual, plain = actual.double(), plain.double()
    if not torch.equal(actual.isfinite(), truth.isfinite()):
        raise AssertionError("infinities or NaN are not where the reference has them")
    finite = truth.isfinite()
    if not finite.any():
        return
    truth = truth[finite]
    error = (actual[finite] - truth).abs().max()
    allowed = factor * (plain[finite] - truth).abs().nan_to_num(0.0).max()
    largest = truth.abs().max()
    allowed += floor * largest.clamp(min=1.0) + rounding_step * largest
    if error > allowed:
        raise AssertionError(
            f"largest error {error:.3g} exceeds {allowed:.3g}, {factor} times the plain formula's "
            f"plus one rounding step and a floor of {floor:g}"
        )
