"""Training with our attention follows training with that of transformers."""

import pytest
import torch

STEPS = 12
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_oss", "bert", "vit", "t5")


@pytest.fixture
def batches(padded_batch):
    """Makes two batches with labels."""

    def make(family):
        if family == "vit":
            return [
                {"pixel_values": torch.randn(6, 3, 16, 16), "labels": torch.randint(5, (6,))}
                for _ in range(2)
            ]
        batches = [padded_batch("right") for _ in range(2)]
        for batch in batches:
            padding = batch["attention_mask"] == 0
            batch["labels"] = batch["input_ids"].masked_fill(padding, -100)
        return batches

    return make


def train(model, batches):
    """Losses of a few steps, two batches in turn."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batches[step % 2]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_agree(family, model_pair, batches):
    theirs, ours = model_pair(family)
    ours.set_attn_implementation("efficient_attn")
    data = batches(family)
    expected, got = train(theirs, data), train(ours, data)
    assert expected[-2] < expected[0] and expected[-1] < expected[1]  # each batch is learned
    assert got == pytest.approx(expected, rel=1e-4)


def test_gradient_checkpointing(model_pair, batches):
    theirs, ours = model_pair("mistral")
    ours.set_attn_implementation("efficient_attn")
    ours.activation_checkpointing_enable()
    data = batches("mistral")
    expected, got = train(theirs, data), train(ours, data)
    assert got == pytest.approx(expected, rel=1e-4)
