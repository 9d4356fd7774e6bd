"""The CUDA kernels of attention to a cache, on a device or emulated, and what they must give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_attn import reference
from efficient_attn.head_map import HeadMap
from efficient_attn.testing import assert_accurate

FLOORS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


@dataclass(frozen=True)
class Machine:
    """A device; or the emulated one, with how many blocks it runs at a time and in which order."""

    device: str = "cpu"
    blocks: int = 8
    seed: int = 0

    def attention_decode(
        self, query, key, value, lengths, head_map=None, table=None, scale=0.125
    ) -> tuple[Tensor, Tensor]:
        maps = () if head_map is None else (head_map.q_to_k, head_map.q_to_v)
        return self._run(
            "attention_decode",
            (
                query,
                key,
                value,
                _integers(lengths),
                table,
                *(maps or (None, None)),
            ),
            (None, scale, 0.0),
        )

    def mla_decode(self, q_latent, q_rope, cache, lengths, table=None) -> tuple[Tensor, Tensor]:
        return self._run(
            "mla_decode",
            (q_latent, q_rope, cache, _integers(lengths), table),
            (0.1,),
        )

    def _run(self, name: str, tensors: tuple, options: tuple) -> tuple[Tensor, Tensor]:
        moved = (None if x is None else _moved(x, self.device) for x in tensors)
        if self.device == "cpu":
            op = getattr(torch.ops.efficient_attn_emulated, name)
            return op(*moved, *options, self.blocks, self.seed)
        out, lse = getattr(torch.ops.efficient_attn_native, name)(*moved, *options)
        return out.cpu(), lse.cpu()


def _integers(lengths) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int64)


def _moved(x: Tensor, device: str) -> Tensor:
    """On a device, with the strides that it has here, also where some are 0."""
    if device == "cpu":
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def compare(
    machine: Machine, query, key, value, lengths, head_map: HeadMap, table=None, caches=None
) -> tuple[Tensor, Tensor]:
    """Assert that the kernel is as near to the truth as the plain formula in the same dtype.

    Args:
        machine: Where it runs.
        query, key, value, lengths, head_map, table: What it computes.
        caches: The keys and values without pages, where there is a table.
    """
    results = machine.attention_decode(query, key, value, lengths, head_map, table)
    options = {"cache_lengths": _integers(lengths), "head_map": head_map, "scale": 0.125}
    inputs = (query, *(caches or (key, value)))
    _assert_accurate(reference.attention_decode, inputs, options, results)
    return results


def compare_latent(machine: Machine, *inputs: Tensor, lengths) -> tuple[Tensor, Tensor]:
    """The same for latent attention: queries, rotary queries, cache."""
    results = machine.mla_decode(*inputs, lengths)
    options = {"cache_lengths": _integers(lengths), "scale": 0.1}
    _assert_accurate(reference.mla_decode, inputs, options, results)
    return results


def _assert_accurate(function, inputs, options, results) -> None:
    truths = function(*(x.double() for x in inputs), **options)
    plains = function(*inputs, **options)
    for result, truth, plain in zip(results, truths, plains, strict=True):
        assert result.shape == truth.shape
        assert_accurate(result, truth, plain, floor=FLOORS[inputs[0].dtype])
    assert results[1].dtype == torch.float32
