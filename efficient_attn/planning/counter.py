"""Random numbers that are a function of a seed and counters, not of the order of calls.

The mixing function is the 32 bit "lowbias32" of Chris Wellons' hash prospector. It is written in
64 bit arithmetic, which every device of torch has, and is two lines in a kernel's unsigned 32 bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW_32_BITS = 0xFFFFFFFF


def random_bits(seed: int, *counters: Tensor | int) -> Tensor:
    """32 random bits per element of the broadcast counters, as int64 in ``[0, 2**32)``."""
    state = torch.zeros((), dtype=torch.int64)
    for counter in (seed & _LOW_32_BITS, (seed >> 32) & _LOW_32_BITS, *counters):
        state = _mix(_mix(state + 0x9E3779B9) ^ counter)
    return state


def random_below(limit: Tensor, seed: int, *counters: Tensor | int) -> Tensor:
    """A random integer in ``[0, limit)`` per element; 0 where the limit is 0."""
    return (random_bits(seed, *counters) * limit) >> 32


def random_normal(seed: int, *counters: Tensor | int) -> Tensor:
    """A standard normal number per element, fp64, by the method of Box and Muller."""
    first, second = ((random_bits(seed, *counters, i) + 0.5) / 2**32 for i in range(2))
    return torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * math.pi * second)


def _mix(x: Tensor) -> Tensor:
    x = x & _LOW_32_BITS
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_32_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_32_BITS
    return x ^ (x >> 16)
