"""Caches for the decode kernels, and their comparison with the reference."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from efficient_attn import reference
from efficient_attn.kernels.triton import decode
from efficient_attn.testing import assert_accurate
from tests import cached_inputs
from tests.kernels.triton.oracle import DEVICE


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


cached = functools.partial(cached_inputs.cached, device=DEVICE)


def run(query, key, value, lengths, table=None, head_map=None, **options) -> tuple[Tensor, Tensor]:
    """The kernel, with the options of the reference."""
    maps = (None, None) if head_map is None else (head_map.q_to_k, head_map.q_to_v)
    window = options.get("window")
    return decode.decode(
        query, key, value, torch.tensor(lengths, device=DEVICE), table, *maps,
        None if window is None else window[0], options.get("scale", query.shape[-1] ** -0.5),
        options.get("softcap", 0.0),
    )  # fmt: skip


def compare(query, key, value, lengths, head_map, floor=2e-6, **options) -> tuple[Tensor, Tensor]:
    """Assert that the kernel is as near to the truth as the plain formula in the same dtype."""
    head_map = head_map.to(DEVICE)
    results = run(query, key, value, lengths, head_map=head_map, **options)
    options |= {"cache_lengths": torch.tensor(lengths, device=DEVICE), "head_map": head_map}
    inputs = (query, key, value)
    truths = reference.attention_decode(*(x.double() for x in inputs), **options)
    plains = reference.attention_decode(*inputs, **options)
    for result, truth, plain in zip(results, truths, plains, strict=True):
        assert result.shape == truth.shape
        assert_accurate(result, truth, plain, floor=floor)
    return results


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_close(actual, expected) -> None:
    """As near as two orders of adding up are in fp32; how often keys are split depends on room."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
