"""Benchmarks of efficient_attn against what its users would otherwise run: ``python -m bench``."""
