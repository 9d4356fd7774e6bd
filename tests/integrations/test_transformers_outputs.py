"""Switching the attention of a model changes its outputs by rounding and nothing else."""

import pytest
import torch

TIGHT = {"rtol": 1e-5, "atol": 1e-5}
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_oss")


@pytest.fixture
def switched(count_calls):
    """Outputs of a model after switching it, every attention being ours."""

    def run(model, attentions, **inputs):
        model.set_attn_implementation("efficient_attn")
        with count_calls() as counter:
            outputs = model(**inputs)
        assert counter.calls == attentions
        return outputs

    return run


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_decoder(family, padding, model_pair, decoder_batch, switched):
    theirs, ours = model_pair(family)
    inputs = decoder_batch(padding)
    real = inputs["attention_mask"].bool()
    expected = theirs(**inputs).logits
    got = switched(ours, 2, **inputs).logits
    torch.testing.assert_close(got[real], expected[real], **TIGHT)
    assert got.isfinite().all()


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("family", ["qwen2_moe", "bigbird_pegasus"])
@torch.no_grad()
def test_decoder_that_tells_its_layers_by_the_mask_alone(
    family, padding, model_pair, padded_batch, switched
):
    """That it slides, in one family; in the other, even that it is causal."""
    theirs, ours = model_pair(family)
    inputs = padded_batch(padding)
    real = inputs["attention_mask"].bool()
    expected = theirs(**inputs).logits
    got = switched(ours, 2, **inputs).logits
    torch.testing.assert_close(got[real], expected[real], **TIGHT)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_bert(padding, model_pair, padded_batch, switched):
    theirs, ours = model_pair("bert")
    inputs = padded_batch(padding)
    expected = theirs(**inputs).logits
    got = switched(ours, 2, **inputs).logits
    torch.testing.assert_close(got, expected, **TIGHT)


@torch.no_grad()
def test_vit(model_pair, switched):
    theirs, ours = model_pair("vit")
    pixels = torch.randn(3, 3, 16, 16)
    expected = theirs(pixels).logits
    got = switched(ours, 2, pixel_values=pixels).logits
    torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_t5(padding, model_pair, padded_batch, switched):
    """Position bias, cross attention, and the gradient that the learned bias gets."""
    theirs, ours = model_pair("t5")
    inputs = padded_batch(padding)
    inputs["labels"] = inputs["input_ids"][:, :7].contiguous()
    expected = theirs(**inputs)
    got = switched(ours, 6, **inputs)
    torch.testing.assert_close(got.logits, expected.logits, **TIGHT)
    expected.loss.backward()
    got.loss.backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(family, model_pair, padded_batch, switched):
    """Two sequences in one row, told by position ids alone or by cumulative lengths."""
    theirs, ours = model_pair(family)
    ids = padded_batch("none")["input_ids"]
    first, second = ids[:1, :9], ids[1:2, :15]
    expected = torch.cat((theirs(first).logits, theirs(second).logits), dim=1)
    together = {
        "input_ids": torch.cat((first, second), dim=1),
        "position_ids": torch.cat((torch.arange(9), torch.arange(15)))[None],
    }
    by_positions = switched(ours, 2, **together, use_cache=False).logits
    torch.testing.assert_close(by_positions, expected, **TIGHT)
    # With a cache, transformers looks for no packing in the position ids, and makes no mask.
    ends = torch.tensor([0, 9, 24])
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    lengths |= {"max_length_q": 15, "max_length_k": 15}
    by_lengths = switched(ours, 2, **together, **lengths, use_cache=True).logits
    torch.testing.assert_close(by_lengths, expected, **TIGHT)


@torch.no_grad()
def test_full_graph_compilation(model_pair, decoder_batch):
    theirs, ours = model_pair("mistral")
    ours.set_attn_implementation("efficient_attn")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for padding in ("none", "left"):
        inputs = decoder_batch(padding)
        real = inputs["attention_mask"].bool()
        expected = theirs(**inputs, use_cache=False).logits
        got = compiled(**inputs, use_cache=False).logits
        torch.testing.assert_close(got[real], expected[real], **TIGHT)
