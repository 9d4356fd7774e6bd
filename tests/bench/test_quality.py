"""Pairs are counted as they are evaluated, and windows are given as many."""

import pytest
import torch

pytest.importorskip("transformers")

from bench.pages import markdown
from bench.quality import needle_recall, queries_and_keys, run, variants
from bench.quality_attention import CountPairs, Estimated, attention_layers, full, pairs_of, window
from bench.quality_report import quality_figure
from bench.quality_tasks import LanguageModel
from efficient_attn import HyperConfig, hyper_plan
from efficient_attn.reference.hyper import band_mask, multiplicity, near_mask

LENGTH = 96
SMALL = {"leaf_size": 8, "window": 8, "sinks": 2, "exact_below": 16}


@pytest.fixture(scope="module")
def task():
    return LanguageModel(LENGTH, 2)


def vectors(heads=2):
    torch.manual_seed(0)
    return torch.randn(3, 1, heads, LENGTH, 8)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [0, 8])
def test_pairs_are_those_of_the_weights(causal, size):
    """With one key in each interval, what is sampled is no more than what the weights name."""
    query, key, value = vectors()
    config = HyperConfig(block_size=size, sample_size=8, **SMALL)
    plan = hyper_plan(query, key, causal=causal, config=config)
    named = int((multiplicity(plan, LENGTH, LENGTH, 1) > 0).sum())
    counted = pairs_of(plan, query, key)
    # Counted twice, or drawn for nothing: what is near or in a block already.
    assert named <= counted
    band = band_mask(plan, 0) if size else torch.zeros(1)
    if not size:
        assert counted == named
    overlap = int((band * near_mask(plan, LENGTH, LENGTH)).sum())
    assert counted - named - overlap <= 8 * 2 * LENGTH / 4
    with CountPairs() as count:
        Estimated(config, causal).attend(query, key, value)
    assert count.per_query == counted / (2 * LENGTH)


@pytest.mark.parametrize("causal", [False, True])
def test_the_window_has_as_many_pairs_and_no_more_than_needed(causal):
    for pairs in (5.0, 17.5, 40.0):
        mask = window(LENGTH, 4, pairs, causal).mask
        assert mask.diagonal().all() and mask[10:, :4].all()
        assert 0 <= mask.sum() / LENGTH - pairs <= 2
        assert not (causal and mask.triu(1).any())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_no_variant_has_more_pairs_than_the_published_one(size, causal):
    query, key = torch.randn(2, 1, 1, 512, 32)
    count = {
        name: pairs_of(hyper_plan(query, key, causal=causal, config=config), query, key)
        for name, config in variants(size, causal).items()
    }
    for name, pairs in count.items():
        assert pairs <= 1.03 * count["published"], name


def test_exact_attention_costs_nothing_and_a_narrow_window_something(task):
    layers = list(range(len(attention_layers(task.model))))
    assert len(layers) == 6
    exact, narrow = full(LENGTH, True), window(LENGTH, 2, 4.0, True)
    (result,), _ = run(task, [exact], layers)
    assert abs(result["change"]) < 1e-5
    (result,), _ = run(task, [narrow], layers)
    assert result["change"] > 0.01
    assert abs(task.result()["change"]) < 1e-9, "attention is as it was before"


def test_needles_are_found_by_exact_attention_and_not_by_a_window(task):
    background = queries_and_keys(task)
    exact = full(LENGTH, True)
    found = needle_recall(background, exact, exact, True)
    assert all(share == pytest.approx(1) for share in found["needle_share"].values())
    missed = needle_recall(background, window(LENGTH, 2, 6.0, True), exact, True)
    assert missed["needle_share"]["0.0"] == 0
    # What is missed is the weight that exact attention gives: about half of all.
    assert 0.3 < missed["needle_error"]["0.0"] < 0.7


def test_tables_and_figure():
    record = {
        "kind": "quality", "model": "m", "variant": "window", "size": 32, "tokens": 512,
        "layers": 6, "of_layers": 6, "pairs": 99.6, "loss": 5.0, "perplexity": 148.4,
        "change": 0.01, "change_error": 0.002, "needle_share": {"0.0": 0.5},
        "needle_error": {"0.0": 0.25},
    }  # fmt: skip
    part = {**record, "layers": 3, "change": 0.005}
    environment = {"kind": "environment", "device": "d", "threads": 2, "torch": "2", "commit": "c"}
    page = markdown([environment, record, part])
    assert "| window | 32 | 100 | 148.40 | +0.0100 | 0.0020 | 0.50 | 0.25 |" in page
    assert "| window | 3 of 6 | 148.40 | +0.0050 | 0.0020 |" in page
    assert len(quality_figure([record, part]).axes) == 1
    assert quality_figure([environment]) is None
