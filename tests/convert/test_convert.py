"""Whole conversions, folder to folder, and what stock and own classes make of them."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from efficient_attn import ConversionError
from efficient_attn.convert import convert
from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.source import Source
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
    assert difference < 1e-9
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


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("qwen3", "hf-deepseek", ["normalises query and key heads"]),
        ("mixtral", "hf-deepseek", ["router"]),
        ("mistral", "hf-deepseek", ["window of 6"]),
        ("qwen2-window", "hf-deepseek", ["window of 5"]),
        ("llama-mlp-biases", "hf-deepseek", ["MLP has biases"]),
        ("qwen2", "engine", ["biases in attention", "several pairs", "512 + 64"]),
        ("llama3", "engine", ["rotary table", "several pairs", "24 + 24"]),
    ],
)
def test_what_a_target_cannot_be_is_refused_with_every_reason(saved, tmp_path, name, target, words):
    with pytest.raises(ConversionError) as caught:
        convert(saved(name)[0], tmp_path / "out", target=target)
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_config_of_a_stock_model_springs_no_trap(saved, tmp_path):
    convert(saved("llama-tied")[0], tmp_path / "out", target="hf-deepseek")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["first_k_dense_replace"] == config["num_hidden_layers"] == 3
    assert config["num_nextn_predict_layers"] == 0
    assert config["tie_word_embeddings"] is False
    assert config["rms_norm_eps"] == 1e-6
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    assert config["rope_interleave"] is True and config["routed_scaling_factor"] == 1.0
    assert config["rope_parameters"] == config["rope_scaling"]
    assert "auto_map" not in config
    tensors = Checkpoint.open(tmp_path / "out").tensors
    assert "lm_head.weight" in tensors
    assert not any("q_a_proj" in name or name.endswith(".bias") for name in tensors)


def test_only_known_files_that_are_no_code_are_copied(copied, tmp_path):
    (copied / "modeling_evil.py").write_text("raise SystemExit")
    (copied / "pytorch_model.bin").write_bytes(b"pickle")
    (copied / "notes.txt").write_text("private")
    (copied / "tokenizer.json").write_text("{}")
    told = {"auto_map": {"AutoTokenizer": "evil.T"}, "model_max_length": 5}
    (copied / "tokenizer_config.json").write_text(json.dumps(told))
    convert(copied, tmp_path / "out")
    made = {path.name for path in (tmp_path / "out").iterdir()} - set(
        Checkpoint.open(tmp_path / "out").digests
    )
    assert made == {
        "config.json",
        "conversion.json",
        "conversion.md",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    kept = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert kept == {"model_max_length": 5}


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved("llama")[0], tmp_path / "source")
    return tmp_path / "source"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_source_and_destination_are_two_places(copied, tmp_path):
    before = contents(copied)
    link = tmp_path / "link"
    link.symlink_to(copied)
    for place in (copied, copied / "inside", tmp_path / "x" / ".." / "source", link):
        with pytest.raises(ConversionError, match="is the source"):
            convert(copied, place, force=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConversionError, match="not empty"):
        convert(copied, tmp_path / "full")
    assert contents(copied) == before


def test_equal_conversions_give_equal_bytes_and_a_finished_one_is_not_repeated(saved, tmp_path):
    folder = saved("qwen2")[0]
    first = convert(folder, tmp_path / "a", target="hf-deepseek")
    convert(folder, tmp_path / "b", target="hf-deepseek")
    before = contents(tmp_path / "a")
    assert before == contents(tmp_path / "b")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    again = convert(folder, tmp_path / "a", target="hf-deepseek", resume=True)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == stamps
    with pytest.raises(ConversionError, match="not empty"):
        convert(folder, tmp_path / "a", resume=True)
    convert(folder, tmp_path / "a", force=True)
    assert contents(tmp_path / "a") != before


@pytest.mark.parametrize("layer", [0, 2])
def test_killed_while_a_layer_is_computed_it_resumes_to_the_same_bytes(
    saved, tmp_path, monkeypatch, layer
):
    folder = saved("llama")[0]
    convert(folder, tmp_path / "whole")
    child = os.fork()
    if child == 0:
        read = Source.attention

        def die(self, index):
            if index == layer:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, index)

        monkeypatch.setattr(Source, "attention", die)
        try:
            convert(folder, tmp_path / "out")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError, match="mode.*exact"):
        convert(folder, tmp_path / "out", mode="exact", resume=True)
    seen = []
    read = Source.attention
    monkeypatch.setattr(Source, "attention", lambda self, i: seen.append(i) or read(self, i))
    convert(folder, tmp_path / "out", resume=True)
    assert seen == list(range(layer, 3))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_bad_weight_is_named_and_the_destination_stays_away(copied, tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    path = Checkpoint.open(copied).tensors[name].path
    tensors = load_file(path)
    tensors[name][2, 3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ConversionError, match=name):
        convert(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attacks_leave_nothing_behind(copied, tmp_path):
    (copied / "config.json").write_text(json.dumps({"auto_map": {}}))
    with pytest.raises(ConversionError, match="auto_map"):
        convert(copied, tmp_path / "out")
    with pytest.raises(ConversionError, match="not a folder"):
        convert(tmp_path / "nothing", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_options_are_checked_before_anything_is_looked_at(tmp_path):
    for options, word in (
        ({"to": "gqla"}, "gqla"),
        ({"mode": "lossy"}, "mode"),
        ({"target": "gguf"}, "target"),
        ({"dtype": "int4"}, "dtype"),
        ({"kv_ratio": 0.5}, "compress"),
        ({"mode": "compress", "kv_ratio": 1.5}, "kv_ratio"),
        ({"mode": "compress", "kv_ratio": 0.5, "kv_lora_rank": 4}, "pass one"),
        ({"mode": "compress", "kv_lora_rank": 0}, "kv_lora_rank"),
        ({"mode": "compress", "rope_dim": 3}, "even"),
    ):
        with pytest.raises(ValueError, match=word):
            convert(tmp_path / "nothing", tmp_path / "out", **options)


def test_a_dry_run_reads_no_weight(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    report = convert(saved("llama")[0], tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert report.bytes_per_token == {"before": 3 * 4 * 48, "after": 3 * 4 * 48}
    # Two key heads: shared by two devices each has one, while a latent is on both.
    assert report.parallel["1"] == [576, 576] and report.parallel["2"] == [288, 576]
    assert "| cached bytes per token | 576 | 576 | 1.000 |" in report.markdown()
