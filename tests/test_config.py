"""Configurations refuse what they cannot mean."""

import pytest

from efficient_attn.config import HyperConfig


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"block_size": -1}, ValueError, "block_size is -1; it must be at least 0"),
        ({"sample_size": -1}, ValueError, "sample_size is -1"),
        ({"sample_size": 2.0}, TypeError, "pass an integer"),
        ({"sample_size": True}, TypeError, "pass an integer"),
        ({"leaf_size": 0}, ValueError, "leaf_size is 0; it must be at least 1"),
        ({"num_projections": 0}, ValueError, "between 1 and 16"),
        ({"num_projections": 17}, ValueError, "between 1 and 16"),
        ({"exact_below": 1}, ValueError, "at least 2"),
        ({"center": 1}, TypeError, "pass True or False"),
        ({"leaf_size": None, "own_samples": False}, ValueError, "set leaf_size"),
        ({"leaf_size": None, "window": 0, "sinks": 0}, ValueError, "own_samples is True"),
    ],
    ids=str,
)
def test_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        HyperConfig(**change)


def test_the_published_structure_needs_keys():
    with pytest.raises(ValueError, match="no keys to attend to"):
        HyperConfig.paper(block_size=0, sample_size=0)


def test_paper_is_the_published_parameters():
    paper = HyperConfig.paper()
    assert paper.is_published and not HyperConfig().is_published
    assert (paper.block_size, paper.sample_size, paper.num_projections) == (256, 256, 7)
    assert paper.exact_below == 4096 and paper.replacement and not paper.center
    assert HyperConfig.paper(block_size=64).block_size == 64
