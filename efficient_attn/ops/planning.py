"""The parts of a HyperAttention plan that look at every token: hashing, and ordering by hash."""

from __future__ import annotations

import torch

from efficient_attn.ops import _register

_register.define(
    "lsh_codes(Tensor x, Tensor normals, SymInt bits, bool center, SymInt leaf, SymInt first, "
    "bool own) -> Tensor"
)
_register.define(
    "segment_order(Tensor codes, SymInt bins, SymInt[] sizes, SymInt tokens, SymInt first) -> "
    "(Tensor order, Tensor rank)"
)
_PLANNING = "efficient_attn.planning"
_register.implement("lsh_codes", "CompositeExplicitAutograd", f"{_PLANNING}.hashing:lsh_codes")
_register.implement(
    "segment_order", "CompositeExplicitAutograd", f"{_PLANNING}.ordering:segment_order"
)


@_register.fake("lsh_codes")
def _(x, *options):
    return x.new_empty(x.shape[:-1], dtype=torch.int32)


@_register.fake("segment_order")
def _(codes, bins, sizes, tokens, first):
    shape = (*codes.shape[:2], len(sizes), codes.shape[2])
    return codes.new_empty(shape), codes.new_empty(shape)
