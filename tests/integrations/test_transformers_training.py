"""Training with our attention follows training with that of transformers."""

import pytest
import torch
from tiny_models import model_pair, padded_tokens

STEPS = 12
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_oss", "bert", "vit", "t5")


def batch(family, step):
    torch.manual_seed(step)
    if family == "vit":
        return {"pixel_values": torch.randn(6, 3, 16, 16), "labels": torch.randint(5, (6,))}
    ids, mask = padded_tokens("right")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def train(family, model):
    """Losses of a few steps, two batches in turn."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch(family, step % 2)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_agree(family):
    theirs, ours = model_pair(family)
    ours.set_attn_implementation("efficient_attn")
    expected, got = train(family, theirs), train(family, ours)
    assert expected[-2] < expected[0] and expected[-1] < expected[1]  # each batch is learned
    assert got == pytest.approx(expected, rel=1e-4)


def test_gradient_checkpointing():
    theirs, ours = model_pair("mistral")
    ours.set_attn_implementation("efficient_attn")
    ours.activation_checkpointing_enable()
    got, expected = train("mistral", ours), train("mistral", theirs)
    assert got == pytest.approx(expected, rel=1e-4)
