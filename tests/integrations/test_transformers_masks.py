"""The mask function and the attention function together mean what sdpa's two mean.

Masks are made by transformers for its own caches, and one attention layer is run over a sequence
that arrives in chunks, in fp64.
"""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, DynamicCache, MistralConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from efficient_attn.errors import UnsupportedError
from efficient_attn.integrations.model_facts import facts
from efficient_attn.integrations.transformers import (
    NAME,
    as_bias,
    attention_forward,
    attention_forward_under_sdpa_masks,
    attention_mask,
)

BATCH, HEADS, KV_HEADS, DIM, LENGTH = 2, 4, 2, 8, 12
PADDED = {
    "none": None,
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * LENGTH],
    "right": [[1] * LENGTH, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]],
    "holes": [[1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]],
}


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = HEADS // KV_HEADS


def config(implementation, window=None):
    made = MistralConfig(
        sliding_window=window,
        num_hidden_layers=1,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    made._attn_implementation = implementation
    return made


def run_chunks(implementation, function, qkv, chunks, cache_kind, window, padding):
    """Outputs of every query, and the mask of every chunk."""
    configuration = config(implementation, window)
    cache = {
        "dynamic": lambda: DynamicCache(config=configuration),
        "dynamic, full": lambda: DynamicCache(),
        "static": lambda: StaticCache(configuration, max_cache_len=LENGTH + 4),
    }[cache_kind]()
    create = create_causal_mask if window is None else create_sliding_window_causal_mask
    outs, masks, start = [], [], 0
    for size in chunks:
        end = start + size
        query, key, value = (x[:, :, start:end] for x in qkv)
        mask = create(
            config=configuration,
            inputs_embeds=torch.empty(BATCH, size, 0, dtype=query.dtype),
            attention_mask=None if padding is None else padding[:, :end],
            past_key_values=cache,
        )
        key, value = cache.update(key, value, 0)
        options = {} if function is sdpa_attention_forward else {"sliding_window": window}
        outs.append(function(Layer(), query, key, value, mask, scaling=0.7, **options)[0])
        masks.append(mask)
        start = end
    return torch.cat(outs, dim=1), masks


def make_qkv():
    shapes = [(BATCH, heads, LENGTH, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cache", ["dynamic", "dynamic, full", "static"])
@pytest.mark.parametrize("chunks", [(12,), (5, 4, 3), (3, 1, 1, 2, 5)], ids=str)
def test_chunks_agree_with_sdpa(chunks, cache, window, padding):
    qkv = make_qkv()
    padding = None if PADDED[padding] is None else torch.tensor(PADDED[padding])
    expected, _ = run_chunks("sdpa", sdpa_attention_forward, qkv, chunks, cache, window, padding)
    real = torch.ones(BATCH, LENGTH) if padding is None else padding
    for name, function in (
        (NAME, attention_forward),
        ("sdpa", attention_forward_under_sdpa_masks),
        ("eager", attention_forward_under_sdpa_masks),
    ):
        got, _ = run_chunks(name, function, qkv, chunks, cache, window, padding)
        torch.testing.assert_close(got[real.bool()], expected[real.bool()], rtol=0, atol=1e-12)
        assert got.isfinite().all()


def masks_of(chunks, cache, window=None, padding=None):
    padding = None if padding is None else torch.tensor(PADDED[padding])
    return run_chunks(NAME, attention_forward, make_qkv(), chunks, cache, window, padding)[1]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cache", ["dynamic", "dynamic, full"])
def test_no_mask_is_made_where_order_and_window_say_it_all(cache, window):
    assert masks_of((5, 4, 1, 2), cache, window) == [None] * 4
    assert masks_of((12,), cache, window, "right") == [None]


def test_masks_take_no_more_memory_than_they_must():
    def numbers_stored(mask):
        assert mask.untyped_storage().nbytes() == mask.element_size() * as_bias(mask, None).numel()
        return as_bias(mask, None).numel()

    left, decode = masks_of((11, 1), "dynamic", padding="left")
    assert left.shape == (BATCH, 1, 11, 11) and numbers_stored(left) == BATCH * 11 * 11
    assert decode.shape == (BATCH, 1, 1, 12) and numbers_stored(decode) == BATCH * 12
    # An unpadded batch that fills a static cache: the samples share one mask.
    fill, decode = masks_of((11, 1), "static")
    assert fill.shape == (BATCH, 1, 11, 16) and numbers_stored(fill) == 11 * 16
    assert decode.shape == (BATCH, 1, 1, 16) and numbers_stored(decode) == 16
    # Only padding decides: the queries share one row.
    mask = create_bidirectional_mask(
        config=config(NAME),
        inputs_embeds=torch.empty(BATCH, LENGTH, 0),
        attention_mask=torch.tensor(PADDED["right"]),
    )
    assert mask.shape == (BATCH, 1, LENGTH, LENGTH) and numbers_stored(mask) == BATCH * LENGTH


def test_other_patterns_are_written_out():
    """Chunked order, packed sequences and patterns that a model adds are more than a window."""
    chunked = attention_mask(1, 6, 6, local_size=3, config=config(NAME))
    assert chunked.shape == (1, 1, 6, 6)
    arguments = {
        "config": config(NAME),
        "inputs_embeds": torch.empty(1, 6, 0),
        "attention_mask": None,
        "past_key_values": None,
    }
    packed = create_causal_mask(**arguments, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert torch.equal(packed[0, 0] == 0, torch.block_diag(*[torch.ones(3, 3).tril()] * 2) == 1)
    widened = create_causal_mask(**arguments, or_mask_function=lambda b, h, q, k: k < 3)
    expected = torch.ones(6, 6).tril().bool() | (torch.arange(6) < 3)
    assert torch.equal(widened[0, 0] == 0, expected)


def test_compiling_reads_no_padding():
    """What a mask holds is unknown while a graph is traced, so nothing may depend on it."""
    padding = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    options = {"attention_mask": padding, "config": config(NAME)}
    assert attention_mask(BATCH, LENGTH, LENGTH, **options) is None
    compiled = torch.compile(attention_mask, backend="eager", fullgraph=True)
    got = compiled(BATCH, LENGTH, LENGTH, **options)
    assert got.shape == (BATCH, 1, LENGTH, LENGTH)


def test_a_padding_token_before_all_others_gets_zeros():
    out, _ = run_chunks(
        NAME, attention_forward, make_qkv(), (12,), "dynamic", None, torch.tensor(PADDED["left"])
    )
    assert (out[0, :3] == 0).all()


@pytest.mark.parametrize(
    ("model_type", "order", "window"),
    [
        ("mistral", True, True),
        ("gemma2", True, True),
        ("gpt_oss", True, True),
        ("llama", True, False),
        ("qwen2_moe", True, False),  # slides, but says so in the mask only
        ("bigbird_pegasus", False, False),  # causal, but says so in the mask only
    ],
)
def test_what_the_layers_of_a_model_know(model_type, order, window):
    configuration = AutoConfig.for_model(model_type)
    MODEL_MAPPING[type(configuration)]  # loads the code of the model
    assert facts(type(configuration)) == (order, window)


def test_nothing_is_assumed_about_unknown_models():
    class MyConfig(MistralConfig):
        pass

    assert facts(MyConfig) == (False, False)
    made = MyConfig()
    made._attn_implementation = NAME
    mask = create_causal_mask(made, torch.empty(1, 5, 0), None, None)
    assert mask.shape == (1, 1, 5, 5)


def test_a_window_with_neither_order_nor_mask_is_refused():
    query, key, value = make_qkv()
    with pytest.raises(UnsupportedError, match="sliding_window"):
        attention_forward(Layer(), query, key, value, None, is_causal=False, sliding_window=4)
    attention_forward(Layer(), query, key, value, None, is_causal=False, sliding_window=LENGTH)
