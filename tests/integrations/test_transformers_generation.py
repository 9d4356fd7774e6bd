"""Search picks the same tokens, whatever the cache."""

import pytest
import torch

NEW_TOKENS = 8
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_oss")


@pytest.fixture
def generate_both(model_pair, count_calls):
    """The tokens that both models generate, and how often our attention ran."""

    def run(family, batch, **options):
        theirs, ours = model_pair(family)
        ours.set_attn_implementation("efficient_attn")
        options = {"do_sample": False, "disable_compile": True, **batch, **options}
        expected = theirs.generate(max_new_tokens=NEW_TOKENS, **options)
        with count_calls() as counter:
            got = ours.generate(max_new_tokens=NEW_TOKENS, **options)
        assert len(expected[:, -NEW_TOKENS:].unique()) > 3, "the models run in circles"
        return expected, got, counter.calls

    return run


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_search_on_a_padded_batch(family, cache, generate_both, padded_batch):
    batch = padded_batch("left")
    expected, got, calls = generate_both(family, batch, cache_implementation=cache)
    assert torch.equal(got, expected)
    assert calls == 2 * NEW_TOKENS


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_search_without_padding(cache, generate_both, padded_batch):
    batch = padded_batch("none")
    expected, got, _ = generate_both("mistral", batch, cache_implementation=cache)
    assert torch.equal(got, expected)


def test_beam_search(generate_both, padded_batch):
    expected, got, _ = generate_both("qwen2", padded_batch("left"), num_beams=3)
    assert torch.equal(got, expected)


def test_chunked_prefill(generate_both, padded_batch):
    batch = padded_batch("none")
    expected, got, calls = generate_both("mistral", batch, prefill_chunk_size=5)
    assert torch.equal(got, expected)
    assert calls > 2 * NEW_TOKENS


def test_prompt_lookup(generate_both, padded_batch):
    """Several candidates are checked at once, against a cache that is cut back again."""
    batch = {name: x[:1].repeat(1, 2) for name, x in padded_batch("none").items()}
    expected, got, calls = generate_both("llama", batch, prompt_lookup_num_tokens=3)
    assert torch.equal(got, expected)
    assert calls <= 2 * NEW_TOKENS


def test_compiled_decoding(model_pair, padded_batch):
    """Generation with a static cache compiles its decoding steps by itself where it can."""
    theirs, ours = model_pair("mistral")
    ours.set_attn_implementation("efficient_attn")
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    batch = padded_batch("left")
    expected = theirs.generate(**batch, **options)
    ours.forward = torch.compile(ours.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(ours.generate(**batch, **options), expected)
