"""Checkpoints with fewer key heads: what is written, and what is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from efficient_attn.convert import convert, to_diffqkv
from efficient_attn.convert.diffqkv import MERGES
from efficient_attn.errors import ConversionError
from efficient_attn.integrations.diffqkv_model import DiffQKVForCausalLM
from efficient_attn.integrations.verification import verify_folders

FAMILIES = [
    "llama",
    "llama-tied",
    "llama3",
    "llama-yarn",
    "llama-biases",
    "llama-mlp-biases",
    "qwen2",
]


def tokens(rows=3, length=30):
    torch.manual_seed(4)
    return torch.randint(3, 96, (rows, length))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("augmented", [0, 8])
def test_as_many_heads_are_the_same_model(family, augmented, saved, tmp_path):
    source, _ = saved(family)
    report = convert(
        source, tmp_path / "out", "diffqkv", key_heads=2, augmented_query_dim=augmented
    )
    found = verify_folders(source, tmp_path / "out", tokens())
    assert found.classes["after"] == "DiffQKVForCausalLM"
    assert found.comparison.max_logit_difference < 1e-4
    assert found.greedy_match == found.greedy_tokens
    assert found.bytes_per_token["after"] == report.bytes_per_token["after"]
    assert load(tmp_path / "out").num_parameters() == report.parameters["after"]


@pytest.mark.parametrize("merge", MERGES)
def test_fewer_key_heads_hold_fewer_bytes(merge, saved, tmp_path):
    source, _ = saved("llama")
    report = convert(source, tmp_path / "out", "diffqkv", key_heads=1, merge=merge)
    assert report.bytes_per_token == {"before": 3 * 48 * 4, "after": 3 * 36 * 4}
    assert report.warnings
    found = verify_folders(source, tmp_path / "out", tokens())
    assert found.bytes_per_token == report.bytes_per_token
    assert 1e-6 < found.comparison.mean_kl < 10


def test_both_kinds_of_heads_can_be_fewer(saved, tmp_path):
    source, _ = saved("qwen2")
    convert(source, tmp_path / "out", "diffqkv", key_heads=1, value_heads=1)
    model = load(tmp_path / "out")
    assert type(model) is DiffQKVForCausalLM
    assert (model.config.num_key_heads, model.config.num_value_heads) == (1, 1)
    assert torch.isfinite(model(tokens()).logits).all()


def test_the_best_multiples_are_closer_than_the_mean(saved, tmp_path):
    """Where the heads are nearly multiples of one; random heads say nothing of trained ones."""
    source, model = saved("llama")
    pairs, folder = 6, tmp_path / "source"
    model = load(source)
    for layer in model.model.layers:
        key = layer.self_attn.k_proj.weight.data.view(2, 2, pairs, -1)
        z = torch.complex(key[:, 0], key[:, 1])
        z[1] = torch.polar(torch.rand(pairs) + 0.5, torch.rand(pairs) * 6)[:, None] * z[0]
        key[:, 0], key[:, 1] = z.real, z.imag
    model.save_pretrained(folder)
    divergences = {}
    for merge in MERGES:
        convert(folder, tmp_path / merge, "diffqkv", key_heads=1, merge=merge)
        divergences[merge] = verify_folders(folder, tmp_path / merge, tokens()).comparison.mean_kl
    assert divergences["complex_svd"] < 1e-6 < 1e-3 < divergences["mean"]


@pytest.mark.parametrize("family", ["llama", "llama-biases"])
def test_a_text_makes_layers_err_less_and_the_report_tells_by_how_much(family, saved, tmp_path):
    source, _ = saved(family)
    errors = {}
    for merge in MERGES:
        options = {"key_heads": 1, "value_heads": 1, "merge": merge, "calib": tokens(8)}
        report = convert(source, tmp_path / merge, "diffqkv", **options)
        assert report.identity["decisions"]["calibration"]
        assert not any("calib" in warning for warning in report.warnings)
        for layer in report.layers:
            assert 0 < layer["key_error"] < 2 and 0 < layer["value_error"] < 1
            assert 0 < layer["output_error"] < 2
        errors[merge] = [layer["key_error"] for layer in report.layers]
    for svd, *others in zip(errors["complex_svd"], errors["mean"], errors["select"], strict=True):
        assert svd < min(others)
    blind = convert(source, tmp_path / "blind", "diffqkv", key_heads=1)
    assert any("calib" in warning for warning in blind.warnings)
    fitted = convert(source, tmp_path / "fitted", "diffqkv", key_heads=1, calib=tokens(8))
    assert fitted.output_files != blind.output_files


def test_a_resumed_conversion_ends_with_the_same_bytes(saved, tmp_path, monkeypatch):
    source, _ = saved("llama")
    options = {"key_heads": 1, "calib": tokens()}
    whole = convert(source, tmp_path / "whole", "diffqkv", **options)
    real, calls = to_diffqkv.separate_heads, []

    def fails_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(to_diffqkv, "separate_heads", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "cut", "diffqkv", **options)
    monkeypatch.setattr(to_diffqkv, "separate_heads", real)
    resumed = convert(source, tmp_path / "cut", "diffqkv", resume=True, **options)
    assert resumed.output_files == whole.output_files


def test_a_dry_run_reads_and_writes_nothing(saved, tmp_path):
    source, _ = saved("llama")
    options = {"key_heads": 1, "calib": tmp_path / "nowhere", "dry_run": True}
    report = convert(source, tmp_path / "out", "diffqkv", **options)
    assert report.bytes_per_token == {"before": 3 * 48 * 4, "after": 3 * 36 * 4}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gpt2", "diffqkv"])
def test_another_architecture_is_refused_by_name(kind, saved, tmp_path):
    source, _ = saved("llama")
    shutil.copytree(source, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(ConversionError, match=f"model_type is '{kind}'; conversion knows llama"):
        convert(tmp_path / "source", tmp_path / "out", "diffqkv", key_heads=1)


def test_nothing_of_a_window_is_left_in_the_config(saved, tmp_path):
    """Qwen2 speaks of one that it does not use, and caches look there."""
    source, _ = saved("qwen2")
    assert "max_window_layers" in json.loads((source / "config.json").read_text())
    convert(source, tmp_path / "out", "diffqkv", key_heads=1)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"sliding_window", "use_sliding_window", "max_window_layers"} & set(written)


@pytest.mark.parametrize(
    ("family", "options", "messages"),
    [
        ("llama", {"key_heads": 3}, ["3 key heads do not divide its 2"]),
        ("llama", {"key_heads": 1, "value_heads": 5}, ["5 value heads"]),
        ("qwen3", {"key_heads": 1}, ["normalises"]),
        ("mistral", {"key_heads": 1}, ["window of 6"]),
        ("mixtral", {"key_heads": 5}, ["experts", "5 key heads"]),
    ],
)
def test_what_cannot_become_diffqkv_is_refused_with_every_reason(
    family, options, messages, saved, tmp_path
):
    with pytest.raises(ConversionError) as refusal:
        convert(saved(family)[0], tmp_path / "out", "diffqkv", **options)
    assert all(message in str(refusal.value) for message in messages)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"key_heads": 0},
        {"key_heads": 1, "merge": "median"},
        {"key_heads": 1, "augmented_query_dim": -1},
        {"key_heads": 1, "dtype": "int8"},
    ],
)
def test_options_are_checked_before_anything_is_opened(options, tmp_path):
    with pytest.raises(ValueError, match="must be at least|take one of"):
        convert(tmp_path / "nowhere", tmp_path / "out", "diffqkv", **options)
