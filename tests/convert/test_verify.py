"""Figures of a comparison, against their definitions."""

import math

import pytest
import torch

from efficient_attn import ConversionError
from efficient_attn.convert.text import rows_of_text
from efficient_attn.convert.verify import verify

VOCABULARY = 7


def constant(logits):
    return lambda tokens: torch.tensor(logits).log().expand(*tokens.shape, len(logits))


def test_figures_are_their_definitions():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    rows = [torch.tensor([[0, 0, 2], [1, 1, 1]]), torch.tensor([[2, 0]])]
    found = verify(constant(p), constant(q), rows)
    assert found.tokens == 5
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert found.mean_kl == pytest.approx(kl) and found.max_kl == pytest.approx(kl)
    assert found.top1_agreement == 0
    assert found.max_logit_difference == pytest.approx(math.log(2))
    targets = [0, 2, 1, 1, 0]
    for model, perplexity in ((p, found.perplexity_before), (q, found.perplexity_after)):
        loss = -sum(math.log(model[t]) for t in targets) / 5
        assert perplexity == pytest.approx(math.exp(loss))
    assert found.perplexity_ratio == found.perplexity_after / found.perplexity_before


def test_a_model_is_equal_to_itself_and_bounds_hold_to_the_value():
    def model(tokens):
        return torch.nn.functional.one_hot(tokens, VOCABULARY).double()

    found = verify(model, model, [torch.randint(0, VOCABULARY, (2, 9))])
    assert (found.mean_kl, found.top1_agreement, found.perplexity_ratio) == (0, 1, 1)
    assert found.broken_bounds(max_kl=0, max_ppl_ratio=1) == []
    (broken,) = found.broken_bounds(max_ppl_ratio=0.99)
    assert "perplexity ratio is 1" in broken


def test_what_cannot_be_compared():
    with pytest.raises(ConversionError, match="no tokens"):
        verify(constant([0.5, 0.5]), constant([0.5, 0.5]), [torch.zeros(3, 1).long()])
    with pytest.raises(ConversionError, match="not finite"):
        verify(constant([0.5, 0.5]), constant([0.0, 1.0]), [torch.zeros(3, 2).long()])


def test_rows_of_text_are_the_beginning_of_it(tmp_path):
    root = "examples/pycode_llama"
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer

    text = "import os\n" * 500
    (tmp_path / "a.txt").write_text(text)
    ids = Tokenizer.from_file(f"{root}/tokenizer.json").encode(text, add_special_tokens=False).ids
    rows = rows_of_text(root, tmp_path / "a.txt", tokens=100, length=32)
    assert rows.shape == (3, 32) and rows.flatten().tolist() == ids[:96]
    with pytest.raises(ConversionError, match="asked for"):
        rows_of_text(root, tmp_path / "a.txt", tokens=10**6, length=32)
