"""Switching the attention of a model changes its outputs by rounding and nothing else."""

import pytest
import torch
from tiny_models import DECODERS, CountCalls, model_pair, padded_tokens, positions

PADDINGS = ("none", "left", "right")
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def switch(model):
    model.set_attn_implementation("efficient_attn")
    return model


@torch.no_grad()
def outputs(theirs, ours, **inputs):
    """Outputs of both models, ours having run every attention through this package."""
    expected = theirs(**inputs)
    with CountCalls() as counter:
        got = switch(ours)(**inputs)
    assert counter.calls == counter.expected
    return expected, got


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", DECODERS)
def test_decoder(family, padding):
    theirs, ours = model_pair(family)
    ids, mask = padded_tokens(padding)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    with torch.no_grad():
        expected = theirs(**inputs).logits
    with torch.no_grad(), CountCalls() as counter:
        got = switch(ours)(**inputs).logits
    assert counter.calls == 2
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], **TIGHT)
    assert got.isfinite().all()
