"""The cost model against the figures that follow from published sizes."""

import pytest

from efficient_attn import costs

SIGMA = {"1.5B": (2048, 64, 3072, 22_528), "10B": (4096, 128, 6144, 45_056)}


def sigma(size):
    embed_dim, head_dim, inner, _ = SIGMA[size]
    options = {"embed_dim": embed_dim, "num_heads": 32, "head_dim": head_dim}
    diff = costs.heads_variant(
        "DiffQKV", num_key_heads=4, num_value_heads=16, augmented_query_dim=inner, **options
    )
    return diff, costs.heads_variant("GQA", num_key_heads=16, num_value_heads=16, **options)


@pytest.mark.parametrize("size", SIGMA)
def test_sigma_saves_three_eighths_of_the_cache_from_the_derived_length_on(size):
    diff, grouped = sigma(size)
    assert diff.cache_numbers / grouped.cache_numbers == 0.625
    assert costs.break_even(diff, grouped) == SIGMA[size][3]


def test_sigma_keeps_as_many_bytes_as_its_cache_holds():
    assert sigma("1.5B")[0].cache_bytes(26, 2) == 66_560
    assert sigma("10B")[0].cache_bytes(32, 2) == 163_840


def test_a_step_takes_the_time_of_its_bytes_or_of_its_operations():
    grouped = sigma("1.5B")[1]
    load = {"layers": 1, "batch": 1, "context": 32768}
    fast = costs.decode_step(grouped, **load, bandwidth=4.3e12, flops=1e18)
    assert fast.cache == pytest.approx(31.2e-6, rel=2e-3)
    slow = costs.decode_step(grouped, **load, bandwidth=4.3e12, flops=1e12)
    assert slow.cache == pytest.approx(8192 * 32768 / 1e12)
    assert slow.weights == fast.weights == grouped.weights * 2 / 4.3e12


def test_latent_attention_costs_what_its_shapes_say():
    latent = costs.latent_variant(
        "MLA", 4096, 32, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128,
    )  # fmt: skip
    assert latent.cache_numbers == 576
    assert latent.flops == 69_632
    # The four matrices of Llama-3-8B's shape after conversion, in millions.
    assert latent.weights == 6144 * 4096 + 576 * 4096 + 8192 * 512 + 4096 * 4096


def test_break_even_is_zero_or_infinite_where_there_is_nothing_to_weigh():
    diff, grouped = sigma("1.5B")
    assert costs.break_even(grouped, diff) == float("inf")
    multi_query = costs.heads_variant("MQA", 2048, 32, 1, 1, head_dim=64)
    assert costs.break_even(multi_query, grouped) == 0
    assert costs.break_even(grouped, grouped) == float("inf")
