"""Switching the attention of a model changes its outputs by rounding and nothing else."""

import pytest
import torch
from tiny_models import DECODERS, CountCalls, model_pair, padded_tokens, positions

TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def switched_outputs(ours, attentions, **inputs):
    """Outputs of a model after switching it, every attention being ours."""
    ours.set_attn_implementation("efficient_attn")
    with CountCalls() as counter:
        outputs = ours(**inputs)
    assert counter.calls == attentions
    return outputs


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_decoder(family, padding):
    theirs, ours = model_pair(family)
    ids, mask = padded_tokens(padding)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    expected = theirs(**inputs).logits
    got = switched_outputs(ours, 2, **inputs).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **TIGHT)
    assert got.isfinite().all()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_bert(padding):
    theirs, ours = model_pair("bert")
    ids, mask = padded_tokens(padding)
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = theirs(**inputs).logits
    got = switched_outputs(ours, 2, **inputs).logits
    torch.testing.assert_close(got, expected, **TIGHT)


@torch.no_grad()
def test_vit():
    theirs, ours = model_pair("vit")
    pixels = torch.randn(3, 3, 16, 16)
    expected = theirs(pixels).logits
    got = switched_outputs(ours, 2, pixel_values=pixels).logits
    torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_t5(padding):
    """Position bias, cross attention, and the gradient that the learned bias gets."""
    theirs, ours = model_pair("t5")
    ids, mask = padded_tokens(padding)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :7].contiguous()}
    expected = theirs(**inputs)
    got = switched_outputs(ours, 6, **inputs)
    torch.testing.assert_close(got.logits, expected.logits, **TIGHT)
    expected.loss.backward()
    got.loss.backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(family):
    """Two sequences in one row: told by position ids alone, and by cumulative lengths."""
    theirs, ours = model_pair(family)
    ids, _ = padded_tokens("none", length=24)
    first, second = ids[:1, :9], ids[1:2, :15]
    expected = torch.cat((theirs(first).logits, theirs(second).logits), dim=1)
    together = {
        "input_ids": torch.cat((first, second), dim=1),
        "position_ids": torch.cat((torch.arange(9), torch.arange(15)))[None],
    }
    ends = torch.tensor([0, 9, 24])
    lengths = {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": 15,
        "max_length_k": 15,
    }
    told_by_positions = switched_outputs(ours, 2, **together, use_cache=False).logits
    torch.testing.assert_close(told_by_positions, expected, **TIGHT)
    # With a cache, transformers looks for no packing in the position ids and makes no mask.
    told_by_lengths = switched_outputs(ours, 2, **together, **lengths, use_cache=True).logits
    torch.testing.assert_close(told_by_lengths, expected, **TIGHT)


@torch.no_grad()
def test_full_graph_compilation():
    theirs, ours = model_pair("mistral")
    ours.set_attn_implementation("efficient_attn")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for padding in ("none", "left"):
        ids, mask = padded_tokens(padding)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        expected = theirs(**inputs, use_cache=False).logits
        got = compiled(**inputs, use_cache=False).logits
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **TIGHT)
