"""The kinds of call for which the compile check compiles kernels, and how to make them.

The tensors have no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_attn.kernels.triton import (
    attention_bwd,
    attention_fwd,
    decode,
    grouping,
    hyper,
    selective,
)
from efficient_attn.planning import HyperPlan

CAPABILITY = {"sm80": 80, "sm86": 86, "sm90": 90, "sm100": 100}


@dataclass(frozen=True)
class Case:
    """One kind of call: its op, dims, dtype, and the features that change the code.

    ``dims`` are the head dims of queries and values, or the rank and rotary dim of a latent cache.
    """

    arch: str
    dims: tuple[int, int]
    dtype: torch.dtype
    features: frozenset[str] = frozenset()
    op: str = "attention"


FEATURES = ("causal", "window", "softcap", "bias", "map", "two_maps", "key_lengths", "packed")
_EVERYTHING = frozenset(FEATURES) - {"packed", "map", "causal"}


_DECODE_PLAIN = frozenset()
_DECODE_RICH = frozenset({"split", "small_pages", "map", "window", "softcap", "many_tokens"})


def representative_cases() -> Iterator[Case]:
    """A few cases that between them use every feature, data type and architecture."""
    yield Case("sm90", (128, 128), torch.bfloat16, frozenset({"causal"}))
    yield Case("sm90", (64, 64), torch.float16, _EVERYTHING)
    yield Case("sm90", (192, 128), torch.bfloat16, frozenset({"causal", "packed", "map"}))
    yield Case("sm80", (128, 128), torch.bfloat16, frozenset({"causal"}))
    yield Case("sm86", (64, 64), torch.float32)
    yield Case("sm100", (128, 128), torch.bfloat16, frozenset({"causal"}))
    yield from _representative_decode_cases()
    yield Case("sm90", (128, 128), torch.bfloat16, frozenset({"causal", "leaves"}), "hyper")
    yield Case("sm80", (64, 64), torch.float16, frozenset({"leaves"}), "hyper")
    yield Case("sm100", (128, 128), torch.bfloat16, frozenset({"causal"}), "hyper")
    yield Case("sm90", (64, 64), torch.bfloat16, frozenset({"key_lengths"}), "grouping")
    yield Case("sm80", (80, 80), torch.float32, frozenset({"nearest"}), "grouping")


def all_cases() -> Iterator[Case]:
    """Every combination that has been thought of."""
    some = [frozenset(), frozenset({"causal"}), frozenset({"causal", "packed", "map"}), _EVERYTHING]
    alone = [frozenset({feature}) for feature in FEATURES if feature != "causal"]
    for arch in CAPABILITY:
        for dims in ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256)):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                more = alone if dims == (128, 128) and dtype == torch.bfloat16 else []
                for features in some + more:
                    yield Case(arch, dims, dtype, features)
                for features in (("causal",), ("leaves",)):
                    yield Case(arch, dims, dtype, frozenset(features), "hyper")
        for features in ((), ("causal", "leaves")):
            yield Case(arch, (128, 128), torch.bfloat16, frozenset(features), "hyper")
        yield from _decode_cases(arch)
        for dim in (64, 80, 256):
            for features in ((), ("nearest", "key_lengths")):
                yield Case(arch, (dim, dim), torch.bfloat16, frozenset(features), "grouping")


def _representative_decode_cases() -> Iterator[Case]:
    yield Case("sm90", (128, 128), torch.bfloat16, frozenset({"split"}), "attention_decode")
    yield Case("sm90", (128, 128), torch.bfloat16, frozenset({"more_values"}), "attention_decode")
    yield Case("sm80", (64, 64), torch.float16, _DECODE_RICH, "attention_decode")
    yield Case("sm90", (128, 128), torch.bfloat16, frozenset({"split"}), "selective_decode")
    yield Case("sm80", (64, 64), torch.float16, _DECODE_RICH | {"by_mass"}, "selective_decode")
    yield Case("sm100", (64, 64), torch.bfloat16, frozenset({"more_values"}), "selective_decode")
    yield Case("sm90", (512, 64), torch.bfloat16, frozenset({"many_heads"}), "mla_decode")
    yield Case("sm100", (448, 128), torch.bfloat16, frozenset({"large_pages"}), "mla_decode")


def _decode_cases(arch: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dims in ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256)):
            for features in (_DECODE_PLAIN, _DECODE_RICH):
                yield Case(arch, dims, dtype, features, "attention_decode")
                yield Case(arch, dims, dtype, features | {"by_mass"}, "selective_decode")
        for dims in ((512, 64), (448, 128), (256, 64), (100, 0), (512, 128)):
            for features in ((), ("split", "large_pages"), ("many_heads",)):
                yield Case(arch, dims, dtype, frozenset(features), "mla_decode")
    for feature in ("", "more_values", "many_tokens", "small_pages", "large_pages", "map"):
        features = frozenset({feature, "split"} - {""})
        yield Case(arch, (128, 128), torch.bfloat16, features, "attention_decode")
        yield Case(arch, (128, 128), torch.bfloat16, features, "selective_decode")


def _attention(case: Case) -> None:
    has = case.features.__contains__
    batch, heads, kv_heads, tokens = 2, 8, 4, 1024

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def tensor(num_heads: int, dim: int) -> Tensor:
        shape = (batch * tokens, num_heads) if has("packed") else (batch, num_heads, tokens)
        return empty(*shape, dim, 2)[..., 0] if has("strided") else empty(*shape, dim)

    query, key = tensor(heads, case.dims[0]), tensor(kv_heads, case.dims[0])
    value = tensor(kv_heads, case.dims[1])
    q_to_k = q_to_v = empty(heads, dtype=torch.int32) if has("map") else None
    if has("two_maps"):
        q_to_k, q_to_v = (empty(batch, heads, dtype=torch.int32) for _ in range(2))
    bias = empty(1, heads, tokens, tokens) if has("bias") else None
    lengths = empty(batch, dtype=torch.int32) if has("key_lengths") else None
    window = (512 if has("window") else None, 0 if has("causal") or has("window") else None)
    options = (*window, case.dims[0] ** -0.5, 30.0 if has("softcap") else 0.0)
    if has("packed"):
        ends = empty(batch + 1, dtype=torch.int32)
        packing = (ends, ends, tokens, tokens, q_to_k, q_to_v, *options)
        out, lse = attention_fwd.forward_varlen(query, key, value, *packing)
        attention_bwd.backward_varlen(out, lse, query, key, value, out, lse, *packing)
    else:
        maps = (q_to_k, q_to_v, bias, lengths, *options)
        out, lse = attention_fwd.forward(query, key, value, *maps)
        attention_bwd.backward(out, lse, query, key, value, out, lse, *maps, has("bias"))


def call(case: Case) -> None:
    """Make a call of this kind, forward and backward where there is a backward."""
    calls = {"attention": _attention, "hyper": _hyper, "grouping": _grouping}
    calls |= {"attention_decode": _decode, "selective_decode": _decode, "mla_decode": _latent}
    calls[case.op](case)


def _empty(case: Case, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(*shape, dtype=dtype or case.dtype, device="meta")


def _decode(case: Case) -> None:
    has = case.features.__contains__
    batch = 1 if has("split") else 4096
    heads, keys, values = 32, 4, 16 if has("more_values") else 4
    lengths, table, (pages, page_size) = _cache(case, batch)
    query = _empty(case, batch, heads, 8 if has("many_tokens") else 1, case.dims[0])
    key = _empty(case, pages, keys, page_size, case.dims[0])
    value = _empty(case, pages, values, page_size, case.dims[1])
    index = _empty(case, heads, dtype=torch.int32) if has("map") else None
    options = (4096 if has("window") else None, 0.1, 30.0 if has("softcap") else 0.0)
    arguments = (query, key, value, lengths, table, index, index, *options)
    if case.op == "selective_decode":
        selective.decode(*arguments, None if has("by_mass") else 100, 0.1)
    else:
        decode.decode(*arguments)


def _latent(case: Case) -> None:
    batch = 1 if "split" in case.features else 4096
    heads = 128 if "many_heads" in case.features else 16
    lengths, table, (pages, page_size) = _cache(case, batch)
    queries = [_empty(case, batch, heads, 1, dim) for dim in case.dims]
    decode.latent_decode(
        *queries, _empty(case, pages, page_size, sum(case.dims)), lengths, table, 0.1
    )


def _grouping(case: Case) -> None:
    batch, heads, kv_heads, nearest = 8, 32, 8, "nearest" in case.features
    lengths = _empty(case, batch, dtype=torch.int32) if "key_lengths" in case.features else None
    norms = grouping.key_norms(_empty(case, batch, kv_heads, 1024, case.dims[0]), lengths)
    grouping.allocate_heads(norms, heads, 1, nearest, nearest)


def _cache(case: Case, batch: int) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Lengths, block table, and the sizes of the pages or of the whole sequences."""
    lengths = _empty(case, batch, dtype=torch.int32)
    for feature, page_size in (("small_pages", 16), ("large_pages", 128)):
        if feature in case.features:
            return lengths, _empty(case, batch, 512, dtype=torch.int32), (9999, page_size)
    return lengths, None, (batch, 8192)


def _hyper(case: Case) -> None:
    """With leaves, or in the published structure: one segment, or a recursion of three levels."""
    batch, heads, kv_heads, tokens, sample = 2, 8, 4, 8192, 128
    leaves, causal = "leaves" in case.features, "causal" in case.features
    levels, leaf = (1, 128) if leaves else (3, 1024) if causal else (1, 0)
    planes, rows, tiles, sets = (batch, kv_heads), heads // kv_heads * tokens, 96, tokens // 128

    def integers(*shape: int) -> Tensor:
        return _empty(case, *shape, dtype=torch.int32)

    plan = HyperPlan(
        *(integers(*planes, levels, n) for n in (tokens, tokens, rows, rows)),
        integers(*planes, tiles, 256), integers(*planes, tiles), integers(0 if leaves else tiles),
        integers(kv_heads, sets, sample), _empty(case, sets, sample, dtype=torch.float32),
        causal=causal, leaf_size=leaf, window=256 if leaves else 0, sinks=16 if leaves else 0,
        block_size=128, samples_by_leaf=leaves,
    )  # fmt: skip
    query = _empty(case, batch, heads, tokens, case.dims[0])
    key, value = (_empty(case, batch, kv_heads, tokens, dim) for dim in case.dims)
    options = (*plan, case.dims[0] ** -0.5)
    out, lse = hyper.forward(query, key, value, *options)
    hyper.backward(out, lse, query, key, value, out, lse, *options)
