"""Conversion of trained checkpoints between attention layouts, with proof of what changed."""
