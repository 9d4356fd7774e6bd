"""The specification: one readable function per op, slow, any floating dtype."""

from efficient_attn.reference.attention import attention, attention_varlen
from efficient_attn.reference.decode import attention_decode, mla_decode
from efficient_attn.reference.hyper import hyper_attention
from efficient_attn.reference.merge import merge_states
from efficient_attn.reference.selective import selective_decode

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "hyper_attention",
    "merge_states",
    "mla_decode",
    "selective_decode",
]
