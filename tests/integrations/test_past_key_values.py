"""Search picks the same tokens with our caches, on our attention and on that of transformers."""

import pytest
import torch
from transformers import T5ForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from efficient_attn import CacheFullError, UnsupportedError, patch_model
from efficient_attn.cache import PagedBatch
from efficient_attn.integrations.past_key_values import PagedPastKeyValues, StaticPastKeyValues

NEW_TOKENS = 10
FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gpt_oss")
CACHES = {
    "dynamic": DynamicCache,
    "static": lambda: StaticPastKeyValues(64),
    "paged": lambda: PagedPastKeyValues(80, page_size=4),
}
OURS = ("static", "paged")


@pytest.fixture
def both(model_pair):
    def make(family):
        theirs, ours = model_pair(family)
        ours.set_attn_implementation("efficient_attn")
        return theirs, ours

    return make


def search(model, batch, **options):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **batch, **options}
    return model.generate(**options)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens(family, cache, padding, beams, both, padded_batch, poisoned_memory):
    theirs, ours = both(family)
    batch = padded_batch(padding)
    expected = search(theirs, batch, num_beams=beams)
    assert len(expected[:, -NEW_TOKENS:].unique()) > 3, "the models run in circles"
    for model in (theirs, ours):
        past = CACHES[cache]()
        got = search(model, batch, num_beams=beams, past_key_values=past)
        assert torch.equal(got, expected)
        assert past.get_seq_length() == expected.shape[1] - 1


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_calls_the_op_for_it(family, cache, both, padded_batch, ops):
    _, ours = both(family)
    with ops:
        search(ours, padded_batch("none"), past_key_values=CACHES[cache]())
    assert ops.called == ["attention"] * 2 + ["attention_decode"] * 2 * (NEW_TOKENS - 1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "one layer"])
def test_a_patched_model_decodes_by_it_too(layers, cache, model_pair, padded_batch, ops):
    theirs, ours = model_pair("mistral")
    ours.set_attn_implementation("sdpa")
    batch = padded_batch("none")
    with patch_model(ours, layers=layers), ops:
        got = search(ours, batch, past_key_values=CACHES[cache]())
    assert torch.equal(got, search(theirs, batch))
    # Once longer than the window, a model that makes masks for sdpa writes them out.
    steps = 2 * (NEW_TOKENS - 1) if layers is None else 0
    assert ops.called.count("attention_decode") == steps


@pytest.mark.parametrize("cache", OURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_are_checked_at_once_and_cropped(family, cache, both, padded_batch, ops):
    """The assistant is another model, so that some candidates are refused."""
    theirs, ours = both(family)
    assistant = both(family)[0]
    with torch.no_grad():
        for parameter in assistant.model.layers[1].parameters():
            parameter.mul_(0.7)
    batch = {name: x[:1] for name, x in padded_batch("none").items()}
    expected = search(theirs, batch)
    past = CACHES[cache]()
    with ops:
        got = search(ours, batch, past_key_values=past, assistant_model=assistant)
    assert torch.equal(got, expected)
    assert 2 < ops.called.count("attention_decode") < 2 * NEW_TOKENS
    past.crop(-4)
    again = search(ours, {"input_ids": expected}, past_key_values=past, max_new_tokens=2)
    assert torch.equal(again, search(theirs, {"input_ids": expected}, max_new_tokens=2))


def test_pages_are_read_where_they_lie(both, padded_batch, monkeypatch):
    """Only what does not know pages makes a copy, and right after the prompt nothing does."""
    theirs, ours = both("llama")
    batch = padded_batch("none")
    past = PagedPastKeyValues(40, page_size=4)
    search(ours, batch, past_key_values=past, max_new_tokens=1)
    past.crop(-1)
    expected = search(theirs, batch)
    gathered = []
    whole = PagedBatch.filled
    monkeypatch.setattr(PagedBatch, "filled", lambda batch: gathered.append(1) or whole(batch))
    assert torch.equal(search(ours, batch, past_key_values=past), expected)
    assert not gathered
    key, value = past.layers[0].keys, past.layers[0].values
    assert key.shape == value.shape == (3, 2, expected.shape[1] - 1, 16)
    assert "InPages" in repr(key) and type(key + 0) is torch.Tensor
    assert torch.equal(torch.cat([key, value]), torch.cat(whole(key.batch)))


@pytest.mark.parametrize("cache", OURS)
def test_a_cache_is_used_again_and_reset(cache, both, padded_batch):
    theirs, ours = both("llama")
    past = CACHES[cache]()
    first = search(ours, padded_batch("none"), past_key_values=past)
    longer = torch.cat([first, padded_batch("none")["input_ids"][:, :5]], 1)
    expected = search(theirs, {"input_ids": longer})
    assert torch.equal(search(ours, {"input_ids": longer}, past_key_values=past), expected)
    held = past.nbytes
    past.reset()
    assert past.get_seq_length() == 0
    batch = {name: x[:2] for name, x in padded_batch("none").items()}
    got = search(ours, batch, past_key_values=past)
    assert torch.equal(got, search(theirs, batch))
    assert past.nbytes == (held if cache == "paged" else held * 2 // 3)


def test_forks_go_on_in_their_own_ways(both, padded_batch):
    theirs, ours = both("mistral")
    batch = padded_batch("none")
    past = PagedPastKeyValues(36, page_size=4)
    search(ours, batch, past_key_values=past, max_new_tokens=1)  # keeps the prompt alone
    free = past.layers[0].pool.num_free_pages
    prompt = batch["input_ids"]
    for start in (3, 7):
        fork = past.fork()
        assert past.layers[0].pool.num_free_pages == free
        longer = torch.cat([prompt, torch.full_like(prompt[:, :1], start)], 1)
        expected = search(theirs, {"input_ids": longer})
        assert torch.equal(search(ours, {"input_ids": longer}, past_key_values=fork), expected)
        assert past.layers[0].pool.num_free_pages < free
        fork.reset()
        assert past.layers[0].pool.num_free_pages == free
    assert torch.equal(search(ours, batch, past_key_values=past), search(theirs, batch))


@pytest.mark.parametrize("cache", OURS)
def test_sequences_are_repeated_and_chosen(cache, both, padded_batch):
    theirs, ours = both("qwen3")
    batch = padded_batch("none")
    past = CACHES[cache]()
    search(ours, batch, past_key_values=past, max_new_tokens=1)
    past.crop(-1)  # the last token of a prompt is fed again
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([4, 1, 0]))
    chosen = {name: x[[2, 0, 0]] for name, x in batch.items()}
    assert torch.equal(search(ours, chosen, past_key_values=past), search(theirs, chosen))
    assert past.batch_size == 3


@pytest.mark.parametrize("cache", OURS)
def test_chunked_prefill(cache, both, padded_batch):
    theirs, ours = both("mistral")
    batch = padded_batch("none")
    for chunk in (5, 16):
        got = search(ours, batch, past_key_values=CACHES[cache](), prefill_chunk_size=chunk)
        assert torch.equal(got, search(theirs, batch))


@pytest.mark.parametrize("cache", OURS)
def test_an_encoder_and_a_decoder(cache, both, padded_batch):
    """What the encoder gave is cached once and read again at every step."""
    theirs, ours = both("t5")
    assert isinstance(ours, T5ForConditionalGeneration)
    past = EncoderDecoderCache(CACHES[cache](), CACHES[cache]())
    batch = padded_batch("none")
    assert torch.equal(search(ours, batch, past_key_values=past), search(theirs, batch))


def test_bytes_are_the_formula(both, padded_batch):
    _, ours = both("llama")
    batch, config = padded_batch("none"), ours.config
    per_token = 2 * 2 * 16 * 4 * config.num_hidden_layers
    for past, tokens in ((StaticPastKeyValues(50), 3 * 50), (PagedPastKeyValues(30, 8), 30 * 8)):
        assert past.nbytes == 0
        search(ours, batch, past_key_values=past)
        assert past.nbytes == tokens * per_token


@pytest.mark.parametrize(
    ("past", "message"),
    [
        (StaticPastKeyValues(20), "made with capacity=20"),
        (PagedPastKeyValues(20, 4), "pages are needed and"),
    ],
)
def test_a_full_cache_says_so(past, message, both, padded_batch):
    _, ours = both("llama")
    with pytest.raises(CacheFullError, match=message):
        search(ours, padded_batch("none"), past_key_values=past)


@pytest.mark.parametrize("cache", OURS)
def test_gradients_are_refused(cache, both, padded_batch):
    _, ours = both("llama")
    with pytest.raises(UnsupportedError, match="gradient, which would be lost"):
        ours(**padded_batch("none"), past_key_values=CACHES[cache]())


def test_a_model_in_training_has_gradients_through_a_dynamic_cache(both, padded_batch):
    """Where a gradient is wanted, few tokens are no reason to decode."""
    theirs, ours = both("llama")
    ids = padded_batch("none")["input_ids"]
    grads = []
    for model in (theirs, ours):
        past = DynamicCache()
        model(input_ids=ids[:, :12], past_key_values=past)
        model(input_ids=ids[:, 12:], past_key_values=past).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_step_is_one_graph_for_all_lengths(both, padded_batch):
    theirs, ours = both("llama")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    ids = padded_batch("none")["input_ids"]
    expected = theirs(ids).logits
    past = DynamicCache()
    ours(ids[:, :8], past_key_values=past)
    torch._dynamo.utils.counters.clear()
    for i in range(8, 17):
        logits = compiled(ids[:, i : i + 1], past_key_values=past).logits
        torch.testing.assert_close(logits[:, 0], expected[:, i], rtol=1e-4, atol=1e-4)
    # One for the first length, and one for all others.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
