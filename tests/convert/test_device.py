"""What is computed on a device stays on it, as far as tensors without data can tell."""

import pytest
import torch

from efficient_attn.convert.attending import grouped_attention, in_fp32, latent_attention
from efficient_attn.convert.mla import MomentAccumulator, rorope
from tests.convert.mla.layers import FAMILIES, layer

# A device that is everywhere, and does not mix with the CPU either.
DEVICE = "meta"
KINDS = ("llama", "qwen2", "qwen3", "mistral", "half turned", "yarn")


@pytest.mark.parametrize("family", KINDS)
def test_calibration_stays_where_its_inputs_are(family):
    source = in_fp32(layer(**FAMILIES[family]))
    x = torch.empty(2, 20, source.key.shape[1], device=DEVICE)
    accumulator = MomentAccumulator(source, DEVICE)
    accumulator.add(x)
    accumulator.add(x, torch.empty(2, 20))
    for row in x:
        accumulator.attend(row)
    sums = accumulator._second, accumulator._mean, accumulator._shares, accumulator._key_weight
    assert {each.device.type for each in sums} == {DEVICE}


@pytest.mark.parametrize("family", KINDS)
def test_layers_attend_where_their_inputs_are(family):
    source = layer(**FAMILIES[family])
    x = torch.empty(20, source.key.shape[1], device=DEVICE)
    for attend, weights in ((grouped_attention, source), (latent_attention, rorope(source))):
        assert attend(in_fp32(weights, DEVICE), x).device.type == DEVICE
        with pytest.raises(RuntimeError):
            attend(in_fp32(weights), x)
