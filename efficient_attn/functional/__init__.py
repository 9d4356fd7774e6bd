"""What a user calls."""

import efficient_attn.ops  # noqa: F401  registers the operators that these functions call
from efficient_attn.functional.attention import attention
from efficient_attn.functional.decode import attention_decode, mla_decode
from efficient_attn.functional.grouping import (
    allocate_heads,
    difference_scores,
    ema_scores,
    key_norms,
    khan2024_scores,
)
from efficient_attn.functional.hyper import (
    hyper_attention,
    hyper_attention_varlen,
    hyper_plan,
)
from efficient_attn.functional.merge import merge_states
from efficient_attn.functional.perturbation import perturb_heads
from efficient_attn.functional.varlen import attention_varlen

__all__ = [
    "allocate_heads",
    "attention",
    "attention_decode",
    "attention_varlen",
    "difference_scores",
    "ema_scores",
    "hyper_attention",
    "hyper_attention_varlen",
    "hyper_plan",
    "key_norms",
    "khan2024_scores",
    "merge_states",
    "mla_decode",
    "perturb_heads",
]
