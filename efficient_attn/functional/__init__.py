"""What a user calls."""

import efficient_attn.ops  # noqa: F401  registers the operators that these functions call
from efficient_attn.functional.attention import attention
from efficient_attn.functional.decode import attention_decode, mla_decode
from efficient_attn.functional.hyper import (
    hyper_attention,
    hyper_attention_varlen,
    hyper_plan,
)
from efficient_attn.functional.merge import merge_states
from efficient_attn.functional.varlen import attention_varlen

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "hyper_attention",
    "hyper_attention_varlen",
    "hyper_plan",
    "merge_states",
    "mla_decode",
]
