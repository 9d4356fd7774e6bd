"""Whole models with a smaller cache: sizes, tables, the order of work."""

import dataclasses
import json
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from efficient_attn import ConversionError
from efficient_attn.convert import convert
from efficient_attn.convert.activations import Activations
from efficient_attn.convert.mla import CompressOptions
from efficient_attn.convert.mla_compress import CompressedLayers
from efficient_attn.convert.pipeline import open_source
from efficient_attn.convert.source import Source
from efficient_attn.convert.verify import verify
from efficient_attn.integrations.converted import load_converted

pytestmark = pytest.mark.usefixtures("one_thread")

# What takes no time and changes nothing of what is tested here.
QUICK = CompressOptions(refine=1)


@pytest.fixture
def calib():
    return torch.randint(0, 96, (6, 32))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "mistral", "mixtral"])
def test_at_the_full_budget_nothing_is_lost(saved, tmp_path, calib, name):
    folder, model = saved(name)
    report = convert(
        folder, tmp_path / "out", mode="compress", kv_ratio=1.0, choices=QUICK, calib=calib
    )
    # 48 numbers per token, but keys and values are linear in 48 inputs, or in normed heads.
    assert report.identity["decisions"]["qk_rope_head_dim"] == 24
    tokens = torch.randint(0, 96, (2, 40))
    converted = load_converted(tmp_path / "out")
    torch.testing.assert_close(logits(converted, tokens), logits(model, tokens), rtol=0, atol=1e-4)
    assert all(layer["output_error"] < 1e-5 for layer in report.layers)


def test_less_cache_costs_more(saved, tmp_path, calib):
    folder, model = saved("llama")
    errors, kl = [], []
    for ratio in (1.0, 0.75, 0.5, 0.25):
        out = tmp_path / str(ratio)
        report = convert(folder, out, mode="compress", kv_ratio=ratio, choices=QUICK, calib=calib)
        sizes = report.identity["decisions"]
        assert sizes["kv_lora_rank"] + sizes["qk_rope_head_dim"] <= ratio * 48
        assert report.bytes_per_token["after"] <= ratio * report.bytes_per_token["before"]
        errors.append(sum(layer["output_error"] for layer in report.layers))
        converted = load_converted(out)
        kl.append(
            verify(lambda t: logits(model, t), lambda t, c=converted: logits(c, t), [calib]).mean_kl
        )
    assert errors == sorted(errors) and kl == sorted(kl)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_stock_model_computes_the_layers_that_were_chosen(saved, tmp_path, calib, name):
    folder, _ = saved(name)
    options = {"mode": "compress", "kv_ratio": 0.5, "choices": QUICK, "calib": calib}
    convert(folder, tmp_path / "stock", target="hf-deepseek", **options)
    stock, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "stock", trust_remote_code=False, output_loading_info=True
    )
    assert type(stock) is DeepseekV3ForCausalLM and not any(info.values()), info
    sizes = json.loads((tmp_path / "stock" / "config.json").read_text())
    # The same layers, by the same table, in the native form.
    rope_dim = sizes["qk_rope_head_dim"]
    table = stock.model.rotary_emb.inv_freq
    layers = CompressedLayers(open_source(folder), 24, rope_dim, QUICK, table=table)
    from efficient_attn.integrations.converted import replace_attention

    layers.settle(Activations(open_source(folder), calib), one_table=True)
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    replace_attention(native, [layers.convert(i)[0] for i in range(3)])
    tokens = torch.randint(0, 96, (2, 40))
    torch.testing.assert_close(logits(stock, tokens), logits(native, tokens), rtol=0, atol=1e-4)


def test_the_choices_of_the_paper_turn_by_a_grid_that_needs_no_table(saved, tmp_path, calib):
    folder, _ = saved("llama")
    options = {"mode": "compress", "kv_lora_rank": 16, "rope_dim": 6, "calib": calib}
    paper = CompressOptions.paper(fold=2)
    convert(folder, tmp_path / "stock", target="hf-deepseek", choices=paper, **options)
    convert(folder, tmp_path / "native", choices=paper, **options)
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    tokens = torch.randint(0, 96, (2, 40))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    native = load_converted(tmp_path / "native")
    torch.testing.assert_close(logits(stock, tokens), logits(native, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sequential", [False, True])
def test_interrupted_it_resumes_to_the_same_bytes(saved, tmp_path, calib, monkeypatch, sequential):
    folder, _ = saved("llama")
    choices = dataclasses.replace(QUICK, sequential=sequential, weigh_tokens=True)
    options = {"mode": "compress", "kv_ratio": 0.5, "choices": choices, "calib": calib}
    convert(folder, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(CompressedLayers, "_errors", stop_at_the_third())
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError, match="decisions.calibration was"):
        convert(folder, tmp_path / "out", **{**options, "calib": calib.flip(0)}, resume=True)
    convert(folder, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def stop_at_the_third():
    calls = []
    measure = CompressedLayers._errors

    def stop(self, *args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, *args)

    return stop


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_ratio": 0.5}, ["calib"]),
        ({"kv_ratio": 0.02}, ["too few"]),
        ({"kv_ratio": 0.25, "rope_dim": 12}, ["kv_lora_rank is 0"]),
        ({"kv_lora_rank": 4, "rope_dim": 26}, ["rope_dim is 26", "24"]),
        ({"kv_lora_rank": 400, "rope_dim": 8, "allow_larger_cache": True}, None),
        ({"kv_ratio": 0.5, "target": "engine"}, ["rope_dim is 64"]),
        ({"kv_ratio": 0.5, "target": "hf-deepseek", "dtype": "float16"}, ["float16"]),
    ],
)
def test_sizes_that_cannot_be(saved, tmp_path, calib, options, words):
    def attempt():
        given = {} if words == ["calib"] else {"calib": calib}
        return convert(
            saved("llama")[0], tmp_path / "out", mode="compress", choices=QUICK, **given, **options
        )

    if words is None:  # more than can be used is cut down to what can
        sizes = attempt().identity["decisions"]
        assert sizes["kv_lora_rank"] == 40
        return
    with pytest.raises(ConversionError) as caught:
        attempt()
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_options_say_how_much(saved, tmp_path):
    for options in ({}, {"kv_lora_rank": 8}):
        with pytest.raises(ValueError, match="pass both|how much"):
            convert(saved("llama")[0], tmp_path / "out", mode="compress", **options)


LLAMA_3_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def test_a_dry_run_of_a_large_model_costs_nothing(tmp_path, monkeypatch):
    """16 GB that are not there: a header and a file full of holes."""
    from efficient_attn.convert.families import FAMILIES, complete

    config, family = complete(LLAMA_3_8B), FAMILIES["llama"]
    shapes = dict(family.outside(config))
    for i in range(32):
        prefix = family.layers.format(i)
        for own in (family.attention_shapes(config), family.others(config)):
            shapes |= {prefix + name: shape for name, shape in own.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    monkeypatch.setattr(Source, "attention", lambda *_: pytest.fail("a weight was read"))
    for target in ("native", "hf-deepseek", "engine"):
        report = convert(
            folder,
            tmp_path / "out",
            mode="compress",
            target=target,
            kv_lora_rank=512,
            rope_dim=64,
            dry_run=True,
        )
        # 2048 numbers per layer now, 576 then, of two bytes.
        assert report.bytes_per_token == {"before": 2048 * 64, "after": 576 * 64}
        assert report.parallel["4"] == [512 * 64, 576 * 64]
        assert report.parallel["8"] == [256 * 64, 576 * 64]
        grown = report.parameters["after"] - report.parameters["before"]
        if target == "native":
            wide = convert(folder, tmp_path / "out", target=target, dry_run=True)
            assert any("here rows have 2048 and heads 1024" in told for told in wide.warnings)
        # 0.21 billion more, most of it in queries.
        assert 0.20e9 < grown < 0.22e9
        assert report.memory_bytes < 4e9


def test_a_grid_that_leaves_no_room_is_told_with_the_fold_that_would(saved, tmp_path, calib):
    folder, _ = saved("llama")
    options = {"mode": "compress", "kv_ratio": 0.25, "calib": calib}
    with pytest.raises(ConversionError, match="fold=2 halves"):
        convert(folder, tmp_path / "out", choices=CompressOptions.paper(fold=1), **options)
    report = convert(folder, tmp_path / "out", choices=CompressOptions.paper(fold=2), **options)
    assert report.identity["decisions"]["qk_rope_head_dim"] == 6


def test_outputs_are_fitted_to_bring_hidden_states_back(saved, tmp_path, calib):
    """On the text that all is fitted to, the model comes nearer to its source."""
    folder, model = saved("qwen2")
    divergence = {}
    for refit in (False, True):
        out = tmp_path / str(refit)
        choices = dataclasses.replace(QUICK, refit_output=refit)
        convert(folder, out, mode="compress", kv_ratio=0.5, choices=choices, calib=calib)
        converted = load_converted(out)
        divergence[refit] = verify(
            lambda t: logits(model, t), lambda t, c=converted: logits(c, t), [calib]
        ).mean_kl
    assert divergence[True] < 0.9 * divergence[False]


def test_behind_layers_that_lose_nothing_the_source_flows(saved, calib):
    source = open_source(saved("llama")[0])
    layers = CompressedLayers(source, 48, 24, QUICK)
    layers.settle(Activations(source, calib), one_table=False)
    for index in range(3):
        for x, y in zip(layers.flow.states(), layers.behind.states(), strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=1e-4)
        layers.convert(index)
