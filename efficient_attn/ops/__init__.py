"""The package's operators. Importing this registers every schema, so tracing finds them."""

from efficient_attn.ops import (
    attention,
    cuda,
    decode,
    grouping,
    hyper,
    merge,
    native,
    planning,
    varlen,
)

__all__ = [
    "attention",
    "cuda",
    "decode",
    "grouping",
    "hyper",
    "merge",
    "native",
    "planning",
    "varlen",
]

native.activate()
cuda.activate()
