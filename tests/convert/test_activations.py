"""Hidden states of calibration tokens, against the models themselves."""

import pytest
import torch

from efficient_attn import ConversionError
from efficient_attn.convert.activations import Activations
from efficient_attn.convert.attending import grouped_attention, in_fp32, latent_attention
from efficient_attn.convert.mla import rorope
from efficient_attn.convert.pipeline import open_source

from .conftest import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_sees_what_it_sees_in_the_model(saved, name):
    folder, model = saved(name)
    tokens = torch.randint(0, 96, (3, 20))
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    flow = Activations(open_source(folder), tokens, batch=2)
    for theirs in seen:
        ours = torch.cat(list(flow.inputs()))
        close(ours, theirs)
        flow.advance()
    theirs = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    losses = flow.losses()
    assert not losses[:, 0].any()
    close(losses[:, 1:], theirs)
    flow.restart()
    close(torch.cat(list(flow.inputs())), seen[0])


def test_another_attention_may_take_the_place_of_a_layers_own(saved):
    folder, model = saved("llama")
    tokens = torch.randint(0, 96, (2, 9))
    flow = Activations(open_source(folder), tokens)
    flow.advance(torch.zeros_like)
    with torch.no_grad():
        states = model.model.embed_tokens(tokens)
        layer = model.model.layers[0]
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        close(torch.cat(list(flow.inputs())), model.model.layers[1].input_layernorm(states))


def test_tokens_that_cannot_be_are_refused(saved):
    source = open_source(saved("llama")[0])
    for rows in (torch.tensor([[96]]), torch.tensor([[-1]])):
        with pytest.raises(ConversionError, match="outside"):
            Activations(source, rows)
    for rows in (torch.zeros(0, 5).long(), torch.zeros(5).long()):
        with pytest.raises(ConversionError, match="shape"):
            Activations(source, rows)


def test_equal_tokens_have_equal_digests(saved):
    source = open_source(saved("llama")[0])
    digests = {Activations(source, torch.tensor([[1, 2, i]])).digest for i in (3, 3, 4)}
    assert len(digests) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_attends_as_before_once_it_is_latent(saved, name):
    source = open_source(saved(name)[0])
    weights = source.attention(1)
    x = torch.randn(20, 48, dtype=torch.float64)
    converted = rorope(weights)
    expected = grouped_attention(weights, x)
    torch.testing.assert_close(latent_attention(converted, x), expected, rtol=0, atol=1e-11)
    low = latent_attention(in_fp32(converted), x.float())
    torch.testing.assert_close(low.double(), expected, rtol=1e-4, atol=1e-5)
