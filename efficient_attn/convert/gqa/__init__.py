"""Fewer key and value heads: which heads share one, and what that one is. Algebra on one layer."""

from efficient_attn.convert.gqa.grouping import PARTITIONS, GroupedLayer, group_layer
from efficient_attn.convert.gqa.moments import InputMoments
from efficient_attn.convert.gqa.pooling import POOLINGS

__all__ = ["PARTITIONS", "POOLINGS", "GroupedLayer", "InputMoments", "group_layer"]
