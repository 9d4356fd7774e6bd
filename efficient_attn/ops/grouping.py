"""The ops that divide query heads among key heads: schema and shapes. They have no gradient."""

from __future__ import annotations

import torch

from efficient_attn.ops import _register

_register.define("key_norms(Tensor key, Tensor? key_lengths) -> Tensor")
_register.define(
    "allocate_heads(Tensor scores, SymInt num_heads, SymInt min_queries, bool min_max, "
    "bool nearest) -> (Tensor sizes, Tensor index)"
)
_register.define("is_recomputed(Tensor like) -> Tensor")

for _name in ("key_norms", "allocate_heads"):
    _register.implement(
        _name, "CompositeExplicitAutograd", f"efficient_attn.kernels.portable.grouping:{_name}"
    )
    if _register.TRITON_IS_INSTALLED:
        _register.implement(_name, "CUDA", f"efficient_attn.kernels.cuda:{_name}")


_register.implement(
    "is_recomputed",
    "CompositeExplicitAutograd",
    "efficient_attn.kernels.portable.grouping:is_recomputed",
)


@_register.fake("key_norms")
def _(key, key_lengths):
    return key.new_empty(key.shape[:2], dtype=torch.float32)


@_register.fake("allocate_heads")
def _(scores, num_heads, *options):
    index = scores.new_empty(scores.shape[0], num_heads, dtype=torch.int32)
    return scores.new_empty(scores.shape, dtype=torch.int32), index


@_register.fake("is_recomputed")
def _(like):
    return like.new_empty((), dtype=torch.bool)
