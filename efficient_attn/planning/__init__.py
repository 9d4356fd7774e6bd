"""What is decided before an approximate attention is computed, as plain tensors."""

from efficient_attn.planning.hyper import HyperPlan, make_plan

__all__ = ["HyperPlan", "make_plan"]
