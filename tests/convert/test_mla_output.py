"""The output projection that brings converted heads nearest to their source."""

import dataclasses

import pytest
import torch

from efficient_attn.convert.attending import grouped_attention, latent_attention
from efficient_attn.convert.mla import CompressOptions, calibrate, compress, rorope
from efficient_attn.convert.mla_output import refit_output
from tests.convert.mla.layers import FAMILIES, layer

KINDS = ("llama", "all biases", "qwen3", "mistral")


def batches(source):
    x = torch.randn(12, 30, source.key.shape[1]) + 0.3
    return x.split(4)


def compressed(source, inputs):
    moments = calibrate(source, [x.double() for x in inputs])
    return compress(
        source, moments, kv_lora_rank=8, rope_dim=6, options=CompressOptions(refine=0)
    ).weights


def wanted(source, inputs):
    """Of the source's own outputs on the same inputs."""
    for x in inputs:
        yield x, torch.stack([grouped_attention(source, row.double()) for row in x])


def error(converted, source, inputs):
    return sum(
        float((latent_attention(converted, row) - grouped_attention(source, row)).square().sum())
        for batch in inputs
        for row in batch.double()
    )


@pytest.mark.parametrize("family", KINDS)
def test_it_is_the_least_squares_fit(family):
    source = layer(**FAMILIES[family])
    inputs = batches(source)
    converted = compressed(source, inputs)
    fitted = refit_output(converted, wanted(source, inputs), damping=1e-9)
    least = error(fitted, source, inputs)
    assert least < error(converted, source, inputs)
    for step in (1e-2, -1e-2):  # in any direction it is worse
        moved = fitted.output + step * torch.randn_like(fitted.output)
        bias = fitted.output_bias + step * torch.randn_like(fitted.output_bias)
        assert error(dataclasses.replace(fitted, output=moved), source, inputs) > least
        assert error(dataclasses.replace(fitted, output_bias=bias), source, inputs) > least


def test_what_is_right_stays_as_it_is_and_what_is_wrong_in_size_is_righted():
    source = layer()
    inputs, exact = batches(source), rorope(source)
    same = refit_output(exact, wanted(source, inputs))
    torch.testing.assert_close(same.output, exact.output, rtol=0, atol=1e-5)
    half = dataclasses.replace(exact, output=exact.output / 2)
    righted = refit_output(half, wanted(source, inputs), damping=1e-9)
    torch.testing.assert_close(righted.output, exact.output, rtol=0, atol=1e-3)


def test_damping_draws_to_the_projection_that_is_there():
    source = layer()
    inputs = batches(source)
    converted = compressed(source, inputs)
    moved = [
        float((fitted.output - converted.output).norm())
        for d in (1e-6, 1e-2, 1.0, 1e6)
        for fitted in [refit_output(converted, wanted(source, inputs), damping=d)]
    ]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-4 * moved[0]


def test_without_a_bias_none_is_made():
    source = layer()
    inputs = batches(source)
    options = CompressOptions(refine=0, output_bias=False)
    moments = calibrate(source, [x.double() for x in inputs])
    converted = compress(source, moments, kv_lora_rank=8, rope_dim=6, options=options).weights
    fitted = refit_output(converted, wanted(source, inputs), bias=False)
    assert fitted.output_bias is None and not torch.equal(fitted.output, converted.output)
    assert error(fitted, source, inputs) < error(converted, source, inputs)
