"""Attention as ``nn.Module``."""

from efficient_attn.layers.diffqkv import DiffQKVAttention
from efficient_attn.layers.grouped import GroupedQueryAttention
from efficient_attn.layers.hyper import HyperAttention
from efficient_attn.layers.key_driven import DGQA, KDGQA, freeze_groups
from efficient_attn.layers.latent import MultiheadLatentAttention
from efficient_attn.layers.latent_variants import FactoredAttention, NormedLatentAttention
from efficient_attn.layers.multihead import MultiheadAttention
from efficient_attn.layers.perturbed import PGQA
from efficient_attn.layers.rotary import RotaryEmbedding

__all__ = [
    "DGQA",
    "KDGQA",
    "PGQA",
    "DiffQKVAttention",
    "FactoredAttention",
    "GroupedQueryAttention",
    "HyperAttention",
    "MultiheadAttention",
    "MultiheadLatentAttention",
    "NormedLatentAttention",
    "RotaryEmbedding",
    "freeze_groups",
]
