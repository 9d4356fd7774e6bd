"""Kernels that take the place of others, and have to show at their first call that they agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from efficient_attn.ops import _register


@dataclass(frozen=True)
class Candidate:
    """What a kernel has to show before it answers an op.

    Args:
        name: The op.
        covers: Whether the kernel takes these arguments; others go to what answered before.
        sample: Small arguments on a device, which the kernel covers.
        agrees: Compares a result of the kernel with that of what answered before.
    """

    name: str
    covers: Callable[..., bool]
    sample: Callable[[torch.device], tuple]
    agrees: Callable[[Tensor, Tensor], bool]


class CheckedKernel:
    """A kernel in the place of what answered before; ``remove()`` gives the op back.

    At its first call on each device the kernel has to reproduce what answered before on the sample.
    Where it does not, or cannot be launched, then or later, it removes itself and says so in one
    warning; the call is answered all the same.
    """

    def __init__(self, candidate: Candidate, kernel: Callable, dispatch_key: str) -> None:
        self.candidate = candidate
        self.refusal: str | None = None
        self._kernel = kernel
        self._before = _register.implementation(candidate.name, dispatch_key)
        self._trusted_on: set[torch.device] = set()
        self._library = torch.library.Library(_register.NAMESPACE, "IMPL")
        with warnings.catch_warnings():
            # That something is replaced is the purpose.
            warnings.simplefilter("ignore", UserWarning)
            self._library.impl(candidate.name, self._call, dispatch_key, allow_override=True)

    def remove(self) -> None:
        """Unregister; calling it again does nothing."""
        self.refusal = self.refusal or "removed"
        self._library._destroy()

    def _call(self, *args):
        if self.refusal is None and self.candidate.covers(*args) and self._is_trusted(args):
            try:
                return self._kernel(*args)
            except RuntimeError as error:
                self._refuse(f"failed: {error}")
        return self._before(*args)

    def _is_trusted(self, args: tuple) -> bool:
        device = next(x.device for x in tree_iter(args) if isinstance(x, Tensor))
        if device in self._trusted_on:
            return True
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # A check waits for the device, which a capture does not allow.
        try:
            wrong = not self._reproduces_the_sample(device)
        except RuntimeError as error:
            self._refuse(f"failed: {error}")
            return False
        if wrong:
            self._refuse("computes a small sample wrongly on this device, which is worth a report")
            return False
        self._trusted_on.add(device)
        return True

    def _reproduces_the_sample(self, device: torch.device) -> bool:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            args = self.candidate.sample(device)
            results = [x(*args) for x in (self._kernel, self._before)]
        actual, expected = (x if isinstance(x, tuple) else (x,) for x in results)
        return all(map(self.candidate.agrees, actual, expected))

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self.remove()
        warnings.warn(
            f"The native kernel of {self.candidate.name} {reason.rstrip('.')}. From now on what it "
            "has replaced answers, as it did this call.",
            RuntimeWarning,
            stacklevel=2,
        )
