"""Whole conversions, folder to folder, and what stock and own classes make of them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from efficient_attn.convert import convert
from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.integrations.converted import load_converted

from .conftest import FAMILIES

STOCK = ["llama", "llama-tied", "llama3", "llama-yarn", "llama-biases", "qwen2"]


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def stock(folder, **options):
    """Loaded by transformers alone, with nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, **options
    )
    assert type(model) is DeepseekV3ForCausalLM
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(3, 96, (2, 50))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", FAMILIES)
def test_native_output_is_the_same_model(saved, tmp_path, tokens, name):
    folder, _ = saved(name)
    report = convert(folder, tmp_path / "out", mode="exact", dtype="float64")
    # Experts of transformers know fp64 in their plain form alone.
    options = {"experts_implementation": "eager"} if name == "mixtral" else {}
    converted = load_converted(tmp_path / "out", **options).eval()
    double = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()
    difference = (logits(converted, tokens) - logits(double, tokens)).abs().max()
    # Yarn's factor goes onto cosines in fp32 there, and into the weights here.
    assert difference < (1e-5 if name == "llama-yarn" else 1e-9)
    assert report.parameters["after"] == count(tmp_path / "out")


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_deepseek_model_gives_the_same_logits_and_tokens(saved, tmp_path, tokens, name):
    folder, model = saved(name)
    report = convert(folder, tmp_path / "out", target="hf-deepseek")
    converted = stock(tmp_path / "out")
    assert (logits(converted, tokens) - logits(model, tokens)).abs().max() < 1e-5
    greedy = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(tokens[:, :8], **greedy)
    assert torch.equal(converted.generate(tokens[:, :8], **greedy), theirs)
    assert report.parameters["after"] == count(tmp_path / "out")
    assert report.bytes_per_token["before"] == report.bytes_per_token["after"]


def count(folder):
    return sum(entry.numel for entry in Checkpoint.open(folder).tensors.values())


@pytest.mark.parametrize("target", ["native", "hf-deepseek"])
def test_the_cache_holds_as_many_bytes_as_the_report_says(saved, tmp_path, tokens, target):
    folder, model = saved("llama")
    report = convert(folder, tmp_path / "out", target=target)
    load = load_converted if target == "native" else stock
    for side, one in (("before", model), ("after", load(tmp_path / "out"))):
        with torch.no_grad():
            cache = one(tokens, use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == tokens.numel() * report.bytes_per_token[side]
