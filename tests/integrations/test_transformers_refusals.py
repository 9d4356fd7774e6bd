"""What would change the result is refused by name, and nothing is swallowed."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from efficient_attn import UnsupportedError
from efficient_attn.integrations import transformers as ours
from efficient_attn.integrations.transformers import attention_forward


class Layer(nn.Module):
    is_causal = True


def call(mask=None, **options):
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    return attention_forward(Layer(), query, key, key, mask, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"cache": object()},
        {"head_mask": torch.ones(4)},
        {"indices": torch.zeros(1)},
        {"temperature": 2.0},
        {"output_attentions": True},
        {"dropout": 0.1},
        {"mask": torch.ones(2, 5)},
        {"mask": torch.ones(2, 5, dtype=torch.bool)},
        {"mask": torch.ones(2, 1, 5, 5, dtype=torch.long)},
        {"mask": "block mask"},
        {"cu_seq_lens_q": torch.tensor([0, 5])},
    ],
    ids=lambda options: next(iter(options)),
)
def test_refused(options):
    name = next(iter(options))
    with pytest.raises(UnsupportedError, match="attention_mask" if name == "mask" else name):
        call(**options)


def test_every_reason_is_given():
    with pytest.raises(UnsupportedError) as error:
        call(dropout=0.1, head_mask=torch.ones(4), output_attentions=True)
    assert len(error.value.reasons) == 3


def test_what_says_nothing_about_scores_is_let_through():
    expected, weights = call()
    assert weights is None
    torch.manual_seed(0)
    got, _ = call(use_cache=True, position_ids=torch.arange(5)[None], head_mask=None, cache=None)
    assert got.shape == expected.shape


def test_a_mask_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="bias has shape"):
        call(mask=torch.ones(2, 1, 5, 4, dtype=torch.bool))


def test_asking_for_weights(model_pair, padded_batch):
    _, model = model_pair("llama")
    model.set_attn_implementation("efficient_attn")
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**padded_batch("none"), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_dropout_is_refused_in_training_only(padded_batch):
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    model.set_attn_implementation("efficient_attn")
    model.eval()(**padded_batch("right"))
    with pytest.raises(UnsupportedError, match="attention_probs_dropout_prob=0.0"):
        model.train()(**padded_batch("right"))


def test_another_interface_of_masks_is_refused(monkeypatch):
    def older_mask(batch_size, cache_position, kv_length):
        pass

    monkeypatch.setattr(ours, "sdpa_mask", older_mask)
    with pytest.raises(ImportError, match="needs 5.4 or later"):
        ours.register()
