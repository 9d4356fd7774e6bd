"""The package's operators. Importing this registers every schema, so tracing finds them."""

from efficient_attn.ops import attention, decode, grouping, hyper, merge, native, planning, varlen

__all__ = ["attention", "decode", "grouping", "hyper", "merge", "native", "planning", "varlen"]

native.activate()
