"""The package's own exception types."""

from __future__ import annotations

from collections.abc import Sequence


class UnsupportedError(NotImplementedError):
    """An input is valid, but no kernel on this device can honour it.

    Args:
        what: The call that was refused, for example ``"attention on CUDA"``.
        reasons: Every reason, not only the first one found.
        advice: What the caller can do instead.
    """

    def __init__(self, what: str, reasons: Sequence[str], advice: str = "") -> None:
        self.reasons = tuple(reasons)
        message = f"{what} cannot run this input: {'; '.join(self.reasons)}."
        super().__init__(f"{message} {advice}".rstrip())


class ConversionError(ValueError):
    """A checkpoint cannot be converted as asked, with the reason and the way forward."""


class CacheFullError(RuntimeError):
    """A cache has no room for what was to be appended. It was left as it was."""
