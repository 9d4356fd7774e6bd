"""Search picks the same tokens, whatever the cache."""

import pytest
import torch
from tiny_models import DECODERS, CountCalls, model_pair, padded_tokens

NEW_TOKENS = 8


def generate_both(family, ids, mask, **options):
    """The tokens that both models generate, and how often our attention ran."""
    theirs, ours = model_pair(family)
    ours.set_attn_implementation("efficient_attn")
    options = {
        "attention_mask": mask,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "disable_compile": True,
        **options,
    }
    expected = theirs.generate(ids, **options)
    with CountCalls() as counter:
        got = ours.generate(ids, **options)
    assert len(expected[:, -NEW_TOKENS:].unique()) > 3, "the models say too little"
    return expected, got, counter.calls


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_search_on_a_padded_batch(family, cache):
    ids, mask = padded_tokens("left")
    expected, got, calls = generate_both(family, ids, mask, cache_implementation=cache)
    assert torch.equal(got, expected)
    assert calls == 2 * NEW_TOKENS


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_search_without_padding(cache):
    ids, mask = padded_tokens("none")
    expected, got, _ = generate_both("mistral", ids, mask, cache_implementation=cache)
    assert torch.equal(got, expected)


def test_beam_search():
    ids, mask = padded_tokens("left")
    expected, got, _ = generate_both("qwen2", ids, mask, num_beams=3)
    assert torch.equal(got, expected)


def test_chunked_prefill():
    ids, mask = padded_tokens("none")
    expected, got, calls = generate_both("mistral", ids, mask, prefill_chunk_size=5)
    assert torch.equal(got, expected)
    assert calls > 2 * NEW_TOKENS


def test_prompt_lookup():
    """Several candidate tokens are checked at once against a cache that grows and is cut back."""
    ids, mask = padded_tokens("none")
    expected, got, calls = generate_both(
        "llama", ids[:1].repeat(1, 2), mask[:1].repeat(1, 2), prompt_lookup_num_tokens=3
    )
    assert torch.equal(got, expected)
    assert calls <= 2 * NEW_TOKENS
