"""The mask function and the attention function together mean what sdpa's two mean.

Masks are made by transformers for its own caches, and one attention layer is run over a sequence
that arrives in chunks, in fp64.
"""

import inspect

import pytest
import torch
from torch import nn
from transformers import AutoConfig, DynamicCache, MistralConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from efficient_attn.errors import UnsupportedError
from efficient_attn.integrations.transformers import (
    HANDS_OVER_WINDOW,
    NAME,
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


def test_masks_are_no_larger_than_they_must_be():
    left, decode = masks_of((11, 1), "dynamic", padding="left")
    assert left.shape == (BATCH, 1, 11, 11)
    assert decode.shape == (BATCH, 1, 1, 12)
    # An unpadded batch that fills a static cache: the samples share one mask.
    fill, decode = masks_of((11, 1), "static")
    assert fill.shape == (1, 1, 11, 16)
    assert decode.shape == (1, 1, 1, 16)
    # Only padding decides: the queries share one row.
    mask = create_bidirectional_mask(
        config=config(NAME),
        inputs_embeds=torch.empty(BATCH, LENGTH, 0),
        attention_mask=torch.tensor(PADDED["right"]),
    )
    assert mask.shape == (BATCH, 1, 1, LENGTH)


def test_other_patterns_are_written_out():
    """Chunked order, packed sequences and patterns that a model adds are more than a window."""
    chunked = attention_mask(1, 6, 6, mask_function=causal_mask_function, local_size=3)
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
    made = []

    def make(padding):
        made.append(attention_mask(BATCH, LENGTH, LENGTH, attention_mask=padding))
        return made[-1] + 0

    padding = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    got = torch.compile(make, backend="eager", fullgraph=True)(padding)
    assert got.shape == (BATCH, 1, LENGTH, LENGTH)


def test_a_padding_token_before_all_others_gets_zeros():
    out, _ = run_chunks(
        NAME, attention_forward, make_qkv(), (12,), "dynamic", None, torch.tensor(PADDED["left"])
    )
    assert (out[0, :3] == 0).all()


@pytest.mark.parametrize("model_type", sorted(HANDS_OVER_WINDOW))
def test_listed_models_hand_their_window_over(model_type):
    """Every attention layer of a listed model passes ``sliding_window`` on."""
    model_class = _text_model(model_type)
    module = inspect.getmodule(model_class)
    layers = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, nn.Module)
        and "get_interface" in inspect.unwrap(member.forward).__code__.co_names
    ]
    assert layers
    for layer in layers:
        assert "sliding_window=" in inspect.getsource(layer.forward), layer.__name__


def _text_model(model_type):
    configuration = AutoConfig.for_model(model_type)
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(configuration) in mapping:
            return mapping[type(configuration)]
    raise AssertionError(f"no model of type {model_type}")


def test_a_window_with_neither_order_nor_mask_is_refused():
    query, key, value = make_qkv()
    with pytest.raises(UnsupportedError, match="sliding_window"):
        attention_forward(Layer(), query, key, value, None, is_causal=False, sliding_window=4)
    attention_forward(Layer(), query, key, value, None, is_causal=False, sliding_window=LENGTH)
