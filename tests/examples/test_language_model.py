"""The shipped language model is small, loads as any Llama does, and has learnt Python.

The other examples rest on it: a claim such as "identical tokens" says little about a model whose
attention does not matter, and calibration needs text that the model was not trained on.
"""

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "pycode_llama"
sys.path.insert(0, str(EXAMPLES))

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from corpus import is_program, python_sources, split_of  # noqa: E402
from train_language_model import batch_at, mean_loss, schedule  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def unseen(tokenizer):
    """The beginnings of a few files that training held back."""
    texts = (text for _, text in python_sources("test") if len(text) > 8000)
    tokens = [tokenizer(text[:8000]).input_ids[:1024] for text in islice(texts, 6)]
    return [torch.tensor(row) for row in tokens]


def continuation(model, tokenizer, prompt: str, tokens: int = 12) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


# --- the corpus -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("argparse.py", "train"),
        ("inspect.py", "train"),
        ("ast.py", "calibration"),
        ("tempfile.py", "calibration"),
        ("base64.py", "test"),
        ("logging/__init__.py", "test"),
    ],
)
def test_a_file_never_changes_its_split(name, split):
    assert split_of(name) == split


def test_splits_are_disjoint_and_leave_most_text_for_training():
    names = {
        split: {name for name, _ in python_sources(split)}
        for split in ("train", "calibration", "test")
    }
    assert not names["train"] & names["calibration"]
    assert not names["train"] & names["test"]
    assert not names["calibration"] & names["test"]
    assert len(names["train"]) > 5 * len(names["calibration"] | names["test"])
    assert min(map(len, names.values())) > 10


@pytest.mark.parametrize(
    "name",
    [
        "site-packages/torch/__init__.py",
        "test/test_argparse.py",
        "idlelib/idle_test/test_editor.py",
        "encodings/cp1252.py",
        "pydoc_data/topics.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
    ],
)
def test_what_is_no_program_of_the_library_is_left_out(name):
    assert not is_program(name)


# --- the files --------------------------------------------------------------------------------


def test_it_has_five_million_parameters_in_at_most_twelve_megabytes(model):
    assert 4.5e6 < sum(weight.numel() for weight in model.parameters()) < 5.5e6
    assert (MODEL / "model.safetensors").stat().st_size <= 12_000_000


def test_heads_are_grouped_and_embeddings_tied(model):
    assert model.config.num_attention_heads == 4 * model.config.num_key_value_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_plain_load_computes_in_single_precision(model):
    assert model.dtype == torch.float32


def test_the_tokenizer_gives_any_text_back(tokenizer):
    text = "def f(x):\n\treturn 'naïve'  # ☃\r\n\n    \x00"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 4096


# --- what it learnt ---------------------------------------------------------------------------


def test_it_predicts_code_that_it_has_not_seen(model, unseen):
    losses = [mean_loss(model, tokens, length=512) for tokens in unseen]
    assert sum(losses) / len(losses) < 4.6  # a uniform guess scores log(4096) = 8.3


def test_it_uses_its_context(model, unseen):
    """More context than a few tokens must pay, or attention would have nothing to show."""
    near = sum(mean_loss(model, tokens, length=16) for tokens in unseen[:3])
    far = sum(mean_loss(model, tokens, length=512) for tokens in unseen[:3])
    assert far / 3 < near / 3 - 0.25


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("class Point:\n    def __init__(", "self"),
        ("def f(x):\n    if x is", "None"),
        ("    try:\n        value = int(text)\n    except", "Error"),
    ],
)
def test_it_continues_code_as_people_do(model, tokenizer, prompt, expected):
    assert expected in continuation(model, tokenizer, prompt)


# --- the training script ----------------------------------------------------------------------


class CountTokens(torch.nn.Module):
    """A model with loss one per token; it counts how many it was asked to predict."""

    predicted = 0

    def forward(self, tokens, labels):
        self.predicted += tokens.shape[1] - 1
        return transformers.modeling_outputs.CausalLMOutput(loss=torch.tensor(1.0))


@pytest.mark.parametrize("count", [2, 99, 100, 101, 1000])
def test_the_loss_counts_every_token_once(count):
    model = CountTokens()
    assert mean_loss(model, torch.arange(count), length=100) == pytest.approx(1.0)
    assert model.predicted == count - 1


def test_batches_cover_the_text_evenly():
    stream, length = torch.arange(100_000), 512
    visits = torch.zeros(len(stream))
    for step in range(150):  # three times over: 150 steps of 2,048 tokens
        for row in batch_at(stream, step, length):
            visits[row] += 1
    inner = visits[length:-length]
    assert inner.min() >= 2
    assert inner.max() <= 5


def test_the_learning_rate_ends_at_zero():
    shares = [schedule(percent / 100) for percent in range(101)]
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(0, abs=1e-9)
    assert max(shares) == shares[3] == 1
