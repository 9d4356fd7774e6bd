"""Options of conversion to MLA: what each changes, and where it is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from efficient_attn import ConversionError
from efficient_attn.convert import convert
from efficient_attn.convert.activations import Activations
from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.mla import CompressOptions
from efficient_attn.integrations.converted import load_converted
from efficient_attn.layers import FactoredAttention

from .conftest import FAMILIES, make

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = CompressOptions(refine=0)
HALF = {"mode": "compress", "kv_ratio": 0.5, "choices": QUICK}


@pytest.fixture
def calib():
    return torch.randint(0, 96, (6, 32))


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (2, 40))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def sizes_of(folder):
    facts = json.loads((folder / "config.json").read_text())["efficient_attn"]["layers"]
    return [(layer["kv_lora_rank"], layer["qk_rope_head_dim"]) for layer in facts]


def count(folder):
    return sum(entry.numel for entry in Checkpoint.open(folder).tensors.values())


def test_bytes_and_a_share_ask_for_the_same(saved, tmp_path, calib):
    folder = saved("llama")[0]
    # 3 layers, 24 of 48 numbers, 4 bytes.
    by_share = convert(folder, tmp_path / "a", calib=calib, **HALF)
    options = {**HALF, "kv_ratio": None, "kv_budget": 3 * 24 * 4}
    by_bytes = convert(folder, tmp_path / "b", calib=calib, **options)
    assert by_share.output_files == by_bytes.output_files
    assert by_bytes.bytes_per_token["after"] <= 3 * 24 * 4


def test_layers_of_different_sizes_cache_no_more_altogether(tmp_path, calib, tokens):
    # In the first layer, 18 of its 48 numbers tell everything: both keys are the same.
    model, folder = make(FAMILIES["llama"]), tmp_path / "source"
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.data[12:] = attention.k_proj.weight.data[:12]
    attention.v_proj.weight.data[6:] = 0
    model.save_pretrained(folder)
    report = convert(folder, tmp_path / "out", calib=calib, per_layer=True, **HALF)
    sizes = sizes_of(tmp_path / "out")
    numbers = [rank + rope for rank, rope in sizes]
    assert numbers[0] == min(numbers) < max(numbers) and sum(numbers) <= 3 * 24
    assert report.bytes_per_token["after"] == 4 * sum(numbers)
    assert report.identity["decisions"]["kv_lora_rank"] == [rank for rank, _ in sizes]
    assert report.parameters["after"] == count(tmp_path / "out")
    model = load_converted(tmp_path / "out")
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == tokens.numel() * report.bytes_per_token["after"]
    even = convert(folder, tmp_path / "even", calib=calib, **HALF)

    def expected(told):
        return sum(layer["key_error"] + layer["value_error"] for layer in told.layers)

    assert expected(report) < expected(even)
    with pytest.raises(ConversionError, match="filled up with zeros"):
        convert(folder, tmp_path / "no", calib=calib, per_layer=True, target="hf-deepseek", **HALF)
    with pytest.raises(ValueError, match="per_layer chooses"):
        convert(
            folder, tmp_path / "no", mode="compress", per_layer=True, kv_lora_rank=8, rope_dim=4
        )


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama-biases"])
def test_queries_may_come_from_a_latent_without_loss(saved, tmp_path, tokens, name):
    folder, model = saved(name)
    for target, load in (("native", load_converted), ("hf-deepseek", loaded)):
        out = tmp_path / target
        report = convert(folder, out, target=target, q_lora_rank=48)
        assert report.parameters["after"] == count(out)
        converted = load(out)
        difference = (logits(converted, tokens) - logits(model, tokens)).abs().max()
        assert difference < 2e-5  # one more product, and a norm more to do nothing
        latent = converted.model.layers[0].self_attn.q_a_proj.weight.shape[0]
        # Where a bias has no other place, a one is added, and the width rounded up.
        assert latent == (48 if target == "native" or name == "llama" else 64)


def loaded(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is DeepseekV3ForCausalLM and not any(info.values()), info
    return model.eval()


def test_a_narrower_latent_of_queries_loses_less_the_wider_it_is(saved, tmp_path, calib):
    folder = saved("qwen2")[0]
    # What it loses beside a lossless cache.
    options = {**HALF, "kv_ratio": 1.0}
    errors = []
    for rank in (16, 32, 44, 48):
        report = convert(folder, tmp_path / str(rank), calib=calib, q_lora_rank=rank, **options)
        errors.append(sum(layer["output_error"] for layer in report.layers))
        assert report.parameters["after"] == count(tmp_path / str(rank))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-4


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("llama", {"q_lora_rank": 40}, "without loss, the queries of this model take 48"),
        ("llama", {**HALF, "q_lora_rank": 49}, "take from 1 to 48"),
        ("qwen3", {**HALF, "q_lora_rank": 24}, "normalises query heads"),
    ],
)
def test_latents_of_queries_that_cannot_be(saved, tmp_path, calib, name, options, words):
    calib = calib if "mode" in options else None
    with pytest.raises(ConversionError, match=words):
        convert(saved(name)[0], tmp_path / "out", calib=calib, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", ["svd", "random-orthogonal"])
@pytest.mark.parametrize("name", ["llama-yarn", "qwen2", "qwen3"])
def test_factors_for_training_change_nothing_and_cache_as_much(
    saved, tmp_path, tokens, name, factor
):
    folder, _ = saved(name)
    report = convert(folder, tmp_path / "out", mode="exact", factor=factor, dtype="float64")
    assert report.bytes_per_token["after"] == 2 * report.bytes_per_token["before"]  # of fp64
    assert report.parameters["after"] == count(tmp_path / "out")
    converted = load_converted(tmp_path / "out").eval()
    assert isinstance(converted.model.layers[0].self_attn, FactoredAttention)
    double = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert (logits(converted, tokens) - logits(double, tokens)).abs().max() < 1e-9


def test_random_factors_follow_their_seed_and_stock_classes_have_no_place_for_any(saved, tmp_path):
    folder = saved("llama")[0]
    options = {"mode": "exact", "factor": "random-orthogonal"}
    made = [
        convert(folder, tmp_path / str(i), seed=seed, **options).output_files
        for i, seed in enumerate((1, 1, 2))
    ]
    assert made[0] == made[1] != made[2]
    with pytest.raises(ConversionError, match="mixed before they are turned"):
        convert(folder, tmp_path / "no", target="hf-deepseek", **options)
    with pytest.raises(ValueError, match="a choice of mode 'exact'"):
        convert(folder, tmp_path / "no", factor="svd")


@pytest.mark.parametrize("rotation", ["real", "unitary", "query-aware"])
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "mistral"])
def test_heads_are_turned_into_each_other_by_a_text_without_loss(
    saved, tmp_path, calib, tokens, name, rotation
):
    folder, _ = saved(name)
    options = {"dtype": "float64", "choices": CompressOptions(rotation=rotation)}
    convert(folder, tmp_path / "out", calib=calib, **options)
    converted = load_converted(tmp_path / "out").eval()
    double = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert (logits(converted, tokens) - logits(double, tokens)).abs().max() < 1e-9
    # And what was fitted is there: the first of the two heads' pairs holds more than the second.
    layer, flow = converted.model.layers[0].self_attn, Activations(_source(folder), calib)
    rows = layer.project_rows(next(flow.inputs()).double())[..., -24:]
    energy = rows.square().mean((0, 1)).view(6, 2, 2).sum(-1)
    assert (energy[:, 0] >= energy[:, 1]).all() or rotation == "query-aware" or name == "qwen3"


def _source(folder):
    from efficient_attn.convert.pipeline import open_source

    return open_source(folder)


def test_weights_alone_are_factorised_whatever_the_text(saved, tmp_path, calib):
    with pytest.raises(ConversionError, match="'exact' is not fitted"):
        convert(saved("llama")[0], tmp_path / "out", mode="exact", calib=calib)
    assert not (tmp_path / "out").exists()


def test_the_published_choices_fold_as_much_as_is_expected_to_lose_least(saved, tmp_path, calib):
    folder = saved("llama")[0]
    options = {"mode": "compress", "kv_ratio": 0.5, "calib": calib}
    report = convert(folder, tmp_path / "out", choices=CompressOptions.paper(), **options)
    chosen = report.identity["decisions"]
    error = sum(layer["key_error"] + layer["value_error"] for layer in report.layers)
    tried = {}
    for fold in (1, 2):  # 6 pairs a head
        told = convert(
            folder, tmp_path / str(fold), choices=CompressOptions.paper(fold=fold), **options
        )
        tried[fold] = sum(layer["key_error"] + layer["value_error"] for layer in told.layers)
    assert chosen["choices"]["fold"] == min(tried, key=tried.get)
    assert error == min(tried.values())


def test_what_turning_less_loses_is_told_apart(saved, tmp_path, calib):
    folder = saved("llama")[0]
    held_out = torch.randint(0, 96, (4, 32))
    options = {"calib": calib, "held_out": held_out}
    whole = convert(folder, tmp_path / "whole", **{**HALF, "kv_ratio": 1.0}, **options)
    assert whole.losses["turned in part"] == pytest.approx(whole.losses["source"], abs=1e-5)
    half = convert(folder, tmp_path / "half", **HALF, **options)
    assert half.losses["source"] == whole.losses["source"]
    assert half.losses["turned in part"] > half.losses["source"] + 1e-3
    for layer in half.layers:
        assert min(layer["rope_error"], layer["rank_error"]) > 0
        both = layer["rope_error"] + layer["rank_error"]
        assert layer["output_error"] <= both * (1 + 1e-6)
    assert "Loss on held-out text" in half.markdown()
    assert convert(folder, tmp_path / "exact", mode="exact").losses == {}


def test_files_memory_and_devices_have_bounds(saved, tmp_path):
    folder = saved("llama")[0]
    bound = 20_000
    report = convert(folder, tmp_path / "out", shard_size=bound / 1e9)
    files = Checkpoint.open(tmp_path / "out").tensors.values()
    by_file = {}
    for entry in files:
        by_file.setdefault(entry.path, []).append(entry.nbytes)
    assert all(sum(sizes) <= bound or len(sizes) == 1 for sizes in by_file.values())
    assert len(by_file) > 5
    with pytest.raises(ValueError, match="above 0"):
        convert(folder, tmp_path / "no", shard_size=0)
    with pytest.raises(ConversionError, match="GB of memory, and max_memory is 0.1"):
        convert(folder, tmp_path / "no", max_memory=0.1)
    convert(folder, tmp_path / "out", max_memory=report.memory_bytes / 1e9, force=True)
    for device in ("cuda", "tpu"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(ConversionError, match=f"device is '{device}'"):
            convert(folder, tmp_path / "no", calib=torch.zeros(1, 8).long(), device=device)
    assert not (tmp_path / "no").exists()


def test_warnings_say_what_the_output_must_be_spared(saved, tmp_path):
    folder = saved("qwen2")[0]
    report = convert(folder, tmp_path / "out", target="hf-deepseek")
    told = " ".join(report.warnings)
    assert "one scale per tensor makes them zero" in told and "do not train" in told
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["efficient_attn"]["do_not_quantize_per_tensor"] == [
        "model.layers.*.self_attn.kv_a_proj_with_mqa",
        "model.layers.*.self_attn.q_a_proj",
    ]
    # Two key heads on two devices are one each, and a latent is on both.
    assert "on 2 devices that share the heads" in told
    dry = {"dry_run": True, "target": "hf-deepseek"}
    alone = convert(folder, tmp_path / "no", tp=1, **dry)
    assert not any("devices that share" in warning for warning in alone.warnings)
    many = convert(folder, tmp_path / "no", tp=16, **dry)
    assert any("on 16 devices" in warning for warning in many.warnings) and "16" in many.parallel
    assert convert(saved("llama")[0], tmp_path / "native").warnings == [
        warning for warning in report.warnings if "devices" in warning
    ]
    factored = {"mode": "exact", "factor": "svd"}
    (told, _) = convert(saved("llama")[0], tmp_path / "factored", **factored).warnings
    assert "train this form" in told


def test_what_one_scale_per_tensor_would_do(saved, tmp_path):
    """The warning is true: such rounding to eight bits leaves nothing of the latent."""
    convert(saved("llama")[0], tmp_path / "out", target="hf-deepseek")
    checkpoint = Checkpoint.open(tmp_path / "out")
    for name in checkpoint.tensors:
        if "kv_a_proj_with_mqa.weight" in name:
            matrix = checkpoint.read([name])[name]
            scale = matrix.abs().max() / 127
            latent = (matrix[:24] / scale).round()
            assert latent.abs().max() == 0


def test_the_stock_class_of_deepseek_v2_reads_the_same_weights(saved, tmp_path, tokens):
    folder, model = saved("llama")
    convert(folder, tmp_path / "out", target="hf-deepseek")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config |= {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    second, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(second) is DeepseekV2ForCausalLM and not any(info.values()), info
    assert (logits(second.eval(), tokens) - logits(model, tokens)).abs().max() < 1e-5


def test_a_window_that_never_closes_is_no_obstacle(tmp_path, tokens):
    config = type(FAMILIES["mistral"])(**{**FAMILIES["mistral"].to_dict(), "sliding_window": 128})
    model = make(config)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", target="hf-deepseek")
    converted = loaded(tmp_path / "out")
    assert (logits(converted, tokens) - logits(model, tokens)).abs().max() < 1e-5
    greedy = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(tokens[:, :8], **greedy)
    assert torch.equal(converted.generate(tokens[:, :8], **greedy), theirs)
