"""The commands around conversion, and how they end."""

import hashlib
import json
import math
import re
import shutil

import numpy as np
import pytest
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from efficient_attn.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {word: i for i, word in enumerate("abcdefghijklmn")},
        "unk_token": "a",
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder.parent / "text.txt").write_text("a b c n m l k j d e f g h i " * 100)
    return folder


@pytest.fixture
def source(made, tmp_path):
    shutil.copytree(made, tmp_path / "model")
    return tmp_path / "model"


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return re.sub(r"\s+", " ", result.output)


def test_inspect_shows_what_a_model_is_and_can_become(source):
    shown = run("inspect", source)
    assert "4 query, 2 key and value, of 8" in shown and "hf-deepseek" in shown
    # 2 layers, 2 heads of 8, keys and values, 4 bytes.
    assert "256" in shown


def test_a_dry_run_writes_nothing(source, tmp_path):
    shown = run("convert", "mla", source, tmp_path / "out", "--dry-run")
    assert "cached bytes per token" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("target", ["native", "hf-deepseek"])
def test_convert_verifies_and_reports(source, made, tmp_path, target):
    text, report = made.parent / "text.txt", tmp_path / "reports" / "r.json"
    options = ["--target", target, "--text", text, "--text-tokens", 256, "--report", report]
    shown = run("convert", "mla", source, tmp_path / "out", *options, "--max-kl", "1e-8")
    assert "64 of 64" in shown
    told = json.loads(report.read_text())
    assert told["verification"]["bytes_per_token"] == told["bytes_per_token"]
    assert told["verification"]["mean_kl"] < 1e-8
    assert told["verification"]["tokens"] == 255
    assert set(told["output_files"]) == {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert "perplexity ratio" in report.with_suffix(".md").read_text()
    assert not list((tmp_path / "out").glob("*.py"))
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_heads_are_shared_by_one_text_and_measured_on_another(source, made, tmp_path):
    other = made.parent / "calibration.txt"
    other.write_text("d e f g h i a b c n m l k j " * 100)
    options = ["--num-kv-heads", 1, "--calib", other, "--calib-tokens", 128]
    options += ["--text", made.parent / "text.txt", "--text-tokens", 128]
    shown = run("convert", "gqa", source, tmp_path / "out", *options)
    assert "output_error" in shown and "perplexity ratio" in shown
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 1
    shown = run("convert", "gqa", source, tmp_path / "no", "--num-kv-heads", 3, code=2)
    assert "from 1 to 2" in shown and not (tmp_path / "no").exists()


def test_key_heads_are_merged_by_one_text_and_what_was_written_can_be_inspected(
    source, made, tmp_path
):
    other = made.parent / "calibration.txt"
    other.write_text("d e f g h i a b c n m l k j " * 100)
    out, text = tmp_path / "out", ["--text", made.parent / "text.txt", "--text-tokens", 128]
    options = ["--key-heads", 1, "--calib", other, "--calib-tokens", 128]
    shown = run("convert", "diffqkv", source, out, *options, *text)
    assert "output_error" in shown and "LlamaForCausalLM before, DiffQKVForCausalLM after" in shown
    assert "256 before, 192 after" in run("verify", source, out, *text)
    shown = run("inspect", out)
    assert "diffqkv" in shown and "key_error" in shown and "train it a little" in shown
    assert "0.750" in shown  # 192 bytes of 256
    shown = run("convert", "diffqkv", out, tmp_path / "again", "--key-heads", 1, code=2)
    assert "model_type is 'diffqkv'" in shown and not (tmp_path / "again").exists()
    (out / "conversion.json").write_text('{"method": "diffqkv"}')
    assert "no report of a conversion" in run("inspect", out, code=2)


def test_a_bound_that_is_exceeded_is_exit_code_1(source, made, tmp_path):
    out = tmp_path / "out"
    run("convert", "mla", source, out, "--dtype", "bfloat16")
    text = ["--text", made.parent / "text.txt", "--text-tokens", 128]
    assert "mean kl" in run("verify", source, out, *text)
    shown = run("verify", source, out, *text, "--max-kl", "1e-12", code=1)
    assert "above the bound" in shown
    shown = run("verify", source, out, *text, "--max-ppl-ratio", "0.5", code=1)
    assert "perplexity ratio" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "magic"], ["mode", "magic", "compress"]),
        (["--dtype", "int8"], ["dtype", "bfloat16"]),
        (["--kv-ratio", "0.5"], ["kv_ratio", "compress"]),
        (["--max-kl", "1"], ["--text"]),
        (["--target", "hf-deepseek", "--dtype", "float16"], ["float16", "bfloat16", "native"]),
    ],
)
def test_options_that_do_not_go_together_end_in_one_line(source, tmp_path, arguments, words):
    shown = run("convert", "mla", source, tmp_path / "out", *arguments, code=2)
    assert all(word in shown for word in words), shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_bad_texts_end_in_one_line(source, tmp_path):
    out = tmp_path / "out"
    run("convert", "mla", source, out)
    (tmp_path / "short.txt").write_text("a b c")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, word in (("short", "3 tokens"), ("binary", "UTF-8"), ("missing", "not a file")):
        assert word in run("verify", source, out, "--text", tmp_path / f"{name}.txt", code=2)
    (source / "tokenizer.json").write_text("{}")
    assert "tokenizer" in run("verify", source, out, "--text", tmp_path / "short.txt", code=2)


def test_compress_is_fitted_to_one_text_and_measured_on_another(source, made, tmp_path):
    calib, text = made.parent / "text.txt", tmp_path / "other.txt"
    text.write_text("n m l k a b c d " * 100)
    options = ["--mode", "compress", "--kv-ratio", 0.5, "--calib", calib, "--calib-tokens", 128]
    for choices in (["--fold", "auto"], ["--paper"], ["--sequential", "--weigh-tokens"]):
        out = tmp_path / f"out-{choices[0]}"
        verified = ["--text", text, "--text-tokens", 128]
        shown = run("convert", "mla", source, out, *options, *choices, *verified)
        assert "Layers" in shown and "perplexity ratio" in shown
        told = json.loads((out / "conversion.json").read_text())["identity"]["decisions"]
        assert told["choices"]["metric"] == ("balanced" if "--paper" in choices else "output")
    levers = ["--rotation", "real", "--metric", "plain", "--no-center", "--calib-length", 64]
    run("convert", "mla", source, tmp_path / "levers", *options, *levers)
    told = json.loads((tmp_path / "levers" / "conversion.json").read_text())
    chosen = told["identity"]["decisions"]["choices"]
    assert (chosen["rotation"], chosen["metric"], chosen["center"]) == ("real", "plain", False)
    assert "--fold" in run(
        "convert", "mla", source, tmp_path / "o", *options, "--fold", "x", code=2
    )
    out = tmp_path / "out"
    assert "nothing was fitted" in run(
        "convert", "mla", source, out, *options, "--text", calib, code=2
    )
    options[-1] = 10**6
    assert "asked for" in run("convert", "mla", source, out, *options, code=2)
    assert "dry" not in run("convert", "mla", source, out, *options, "--dry-run")
    assert not out.exists()


def test_a_full_report_tells_where_what_is_lost_is_lost(source, made, tmp_path):
    text, report = tmp_path / "other.txt", tmp_path / "r.json"
    text.write_text("n m l k a b c d " * 100)
    options = ["--mode", "compress", "--kv-ratio", 0.5, "--calib", made.parent / "text.txt"]
    options += ["--calib-tokens", 128, "--text", text, "--text-tokens", 128, "--report", report]
    shown = run("convert", "mla", source, tmp_path / "out", *options, "--verify", "full")
    # A model for 64 positions has no longer ones.
    assert "of 64 tokens" in shown
    told = json.loads(report.read_text())
    assert told["text"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert told["verification"]["long_tokens"] == 64 and told["verification"]["long"]["mean_kl"] > 0
    added, ratio = told["added_nats"], told["verification"]["perplexity_ratio"]
    assert sum(added.values()) == pytest.approx(math.log(ratio))
    by_turning = told["losses"]["turned in part"] - told["losses"]["source"]
    assert added["by turning less"] == by_turning
    assert told["verification"]["perplexity_before"] == pytest.approx(
        math.exp(told["losses"]["source"]), rel=1e-4
    )
    assert set(told["seconds"]) == {"converting", "verifying"}
    page = report.with_suffix(".md").read_text()
    assert "nats per token added" in page and "(r.png)" in page
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    shown = run("convert", "mla", source, tmp_path / "none", *options[:8], "--verify", "none")
    assert "perplexity ratio" not in shown
    again = ["--text", text, "--text-tokens", 128, "--verify", "full"]
    shown = run("verify", source, tmp_path / "out", *again)
    assert "of 64 tokens" in shown
    wrong = ["--verify", "half"]
    assert "quick" in run("convert", "mla", source, tmp_path / "no", *options, *wrong, code=2)
    bounded = ["--max-kl", 1, "--verify", "none"]
    assert "--text" in run("convert", "mla", source, tmp_path / "no", *options, *bounded, code=2)


def test_a_budget_that_does_not_fit_ends_in_one_line(source, tmp_path):
    for options, words in (
        (["--max-memory", 0.01], "max_memory is 0.01"),
        (["--kv-budget", 100], "mode 'compress'"),
        (["--device", "tpu", "--calib", source / "config.json", "--calib-tokens", 4], "tpu"),
        (["--allow-rope-approx"], "is for target 'engine'"),
    ):
        assert words in run("convert", "mla", source, tmp_path / "out", *options, code=2)
        assert not (tmp_path / "out").exists()


def encoder(folder, config, model_class):
    model_class(config).save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def test_the_heads_of_an_encoder_are_shared_and_its_embeddings_compared(tmp_path, made):
    config = BertConfig(**SMALL, num_attention_heads=4, vocab_size=96, max_position_embeddings=64)
    source = encoder(tmp_path / "bert", config, BertModel)
    around = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in (("m", 12), ("n", 13))}
    template = [{"SpecialToken": {"id": name, "type_id": 0}} for name in "mn"]
    processor = {"type": "TemplateProcessing", "single": [template[0], *around, template[1]]}
    processor |= {"pair": processor["single"], "special_tokens": special}
    (source / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "post_processor": processor}))
    calib, text = tmp_path / "calib.txt", made.parent / "text.txt"
    calib.write_text("d e f g h i a b c n m l k j " * 100)
    report, out = tmp_path / "r.json", tmp_path / "out"
    options = ["--num-kv-heads", 2, "--calib", calib, "--calib-tokens", 128]
    options += ["--text", text, "--text-tokens", 256, "--report", report]
    shown = run("convert", "gqa", source, out, *options, "--min-cosine", "0.1")
    assert "keys and values, bytes per token" in shown and "mean cosine" in shown
    told = json.loads(report.read_text())
    assert told["verification"]["inputs"] == 4, "rows are as long as there are positions"
    assert 0.1 < told["verification"]["mean_cosine"] < 1 and not told["cached"]
    assert all(layer["output_error"] > 0 for layer in told["layers"])
    shown = run("verify", source, out, "--text", text, "--text-tokens", 64)
    assert "first token cosine" in shown
    run("verify", source, out, "--text", text, "--text-tokens", 64, "--min-cosine", "1.1", code=1)
    shown = run("verify", source, out, "--text", text, "--max-kl", "1", code=2)
    assert "--min-cosine" in shown
    assert "bert" in run("inspect", source)


def test_the_heads_of_a_vision_transformer_are_shared_by_images(tmp_path):
    config = ViTConfig(**SMALL, num_attention_heads=4, image_size=16, patch_size=4)
    source = encoder(tmp_path / "vit", config, ViTForImageClassification)
    rng = np.random.default_rng(0)
    for name in ("calib", "images"):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, (9, 20, 20, 3), dtype=np.uint8))
    calib, images = tmp_path / "calib.npy", tmp_path / "images.npy"
    options = ["--num-kv-heads", 3, "--partition", "clustered", "--calib", calib]
    shown = run("convert", "gqa", source, tmp_path / "out", *options, "--images", images)
    assert "top1 agreement" in shown and "output_error" in shown
    shown = run("verify", source, tmp_path / "out", "--images", images, "--text", images, code=2)
    assert "not both" in shown
    assert "nothing was fitted to" in run(
        "convert", "gqa", source, tmp_path / "no", *options, "--images", calib, code=2
    )
    assert "pass --text" in run("verify", source, tmp_path / "out", code=2)
    assert not (tmp_path / "no").exists()


def test_a_bound_of_encoders_is_refused_for_a_decoder(source, made, tmp_path):
    options = ["--num-kv-heads", 1, "--text", made.parent / "text.txt", "--min-cosine", "0.5"]
    shown = run("convert", "gqa", source, tmp_path / "out", *options, code=2)
    assert "--max-kl" in shown and not (tmp_path / "out").exists()
