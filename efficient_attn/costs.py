"""What decoding costs by attention variant: cache bytes, and the time that memory needs.

A step of decoding reads all weights once and the cache of every sequence once, so its time has a
floor that follows from sizes alone::

    bytes = item size * layers * (weights + batch * context * cache numbers)
    time >= max(bytes / bandwidth, floating point operations / rate)

Source: Lin et al., Sigma, arXiv 2501.13629, section 2.3, whose linear cost model this is.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes per second of device memory and dense bf16 FLOP/s, from the makers' data sheets.
DEVICES = {
    "A100-40G": (1.555e12, 312e12),
    "A100-80G": (2.039e12, 312e12),
    "H100": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
    "B200": (8.0e12, 2250e12),
    "L40S": (0.864e12, 362e12),
    "RTX4090": (1.008e12, 165e12),
}


@dataclass(frozen=True)
class Variant:
    """One arrangement of attention, in numbers per layer.

    Attributes:
        name: What the field calls it, with its sizes.
        cache_numbers: Numbers kept of a token.
        weights: Parameters of the attention layer.
        flops: Floating point operations of attention for each new and each cached token.
    """

    name: str
    cache_numbers: int
    weights: int
    flops: int

    def cache_bytes(self, layers: int, itemsize: int) -> int:
        """Bytes of cache per token in all layers."""
        return layers * self.cache_numbers * itemsize


@dataclass(frozen=True)
class Step:
    """The floor of one step of decoding, in seconds.

    Attributes:
        cache: Reading the cache, or computing with it if that takes longer.
        weights: Reading the weights of the attention layers.
    """

    cache: float
    weights: float


def heads_variant(
    name: str,
    embed_dim: int,
    num_heads: int,
    num_key_heads: int,
    num_value_heads: int,
    *,
    head_dim: int,
    v_head_dim: int | None = None,
    augmented_query_dim: int = 0,
) -> Variant:
    """Attention with a cache of heads: multi-head, multi-query, grouped-query or DiffQKV."""
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    cache = num_key_heads * head_dim + num_value_heads * v_head_dim
    query = num_heads * head_dim
    projections = embed_dim * (query + cache + num_heads * v_head_dim)
    augmented = 3 * query * augmented_query_dim
    return Variant(name, cache, projections + augmented, 2 * num_heads * (head_dim + v_head_dim))


def latent_variant(
    name: str,
    embed_dim: int,
    num_heads: int,
    *,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    qk_nope_head_dim: int,
    v_head_dim: int,
) -> Variant:
    """Multi-head latent attention without a low rank of the query, decoded in its absorbed form."""
    cache = kv_lora_rank + qk_rope_head_dim
    query = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
    up = kv_lora_rank * num_heads * (qk_nope_head_dim + v_head_dim)
    weights = embed_dim * (query + cache + num_heads * v_head_dim) + up
    return Variant(name, cache, weights, 2 * num_heads * (cache + kv_lora_rank))


def decode_step(
    variant: Variant,
    *,
    layers: int,
    batch: int,
    context: int,
    bandwidth: float,
    flops: float,
    itemsize: int = 2,
) -> Step:
    """The floor of a step in which each of ``batch`` sequences gets one token.

    Args:
        variant: The arrangement of attention.
        layers: Number of layers.
        batch: Number of sequences.
        context: Cached tokens of each.
        bandwidth: Bytes per second that can be read.
        flops: Floating point operations per second that attention can reach.
        itemsize: Bytes of a number, in the cache and in the weights.
    """
    tokens = layers * batch * context
    reading = tokens * variant.cache_numbers * itemsize / bandwidth
    computing = tokens * variant.flops / flops
    return Step(max(reading, computing), layers * variant.weights * itemsize / bandwidth)


def break_even(variant: Variant, baseline: Variant) -> float:
    """Cached tokens, of all sequences, from which ``variant`` reads less than ``baseline``.

    0 where it always does, infinity where it never does.
    """
    saved = baseline.cache_numbers - variant.cache_numbers
    added = variant.weights - baseline.weights
    if saved <= 0:
        return 0.0 if saved == 0 and added < 0 else float("inf")
    return max(added / saved, 0.0)
