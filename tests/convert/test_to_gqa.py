"""Checkpoints with fewer heads: what is written, what loads it, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from efficient_attn import ConversionError
from efficient_attn.convert import convert
from efficient_attn.integrations.grouped_checkpoints import load_grouped
from efficient_attn.integrations.grouping import calibrate, group_heads
from efficient_attn.integrations.verification import load, verify_folders
from tests.convert.conftest import FAMILIES, make


@pytest.fixture(scope="module")
def with_six_heads(tmp_path_factory):
    """A model of each family with a key head for each of its six query heads, saved."""
    made = {}

    def get(family):
        if family not in made:
            config = FAMILIES[family].__class__.from_dict(
                {**FAMILIES[family].to_dict(), "num_key_value_heads": 6}
            )
            made[family] = tmp_path_factory.mktemp("models") / family
            make(config).save_pretrained(made[family])
        return made[family]

    return get


def tokens(rows=3, length=30):
    torch.manual_seed(4)
    return torch.randint(3, 96, (rows, length))


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_heads_are_the_same_tensors(family, with_six_heads, tmp_path):
    source = with_six_heads(family)
    report = convert(source, tmp_path / "out", "gqa", num_kv_heads=6, calib=tokens())
    before, after = tensors(source), tensors(tmp_path / "out")
    after.setdefault("lm_head.weight", None), before.setdefault("lm_head.weight", None)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor is None or torch.equal(tensor, after[name])
    assert not report.warnings and all(layer["output_error"] < 1e-6 for layer in report.layers)


@pytest.mark.parametrize(
    ("family", "pooling"), [("llama", "mean"), *((family, "fitted") for family in FAMILIES)]
)
def test_even_groups_are_loaded_by_the_stock_class(family, pooling, with_six_heads, tmp_path):
    source = with_six_heads(family)
    options = {"num_kv_heads": 2, "pooling": pooling}
    report = convert(source, tmp_path / "out", "gqa", calib=tokens(), **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    assert report.bytes_per_token["after"] * 3 == report.bytes_per_token["before"]
    found = verify_folders(source, tmp_path / "out", tokens())
    assert found.classes["before"] == found.classes["after"]
    assert found.bytes_per_token == report.bytes_per_token
    assert load(tmp_path / "out").num_parameters() == report.parameters["after"]
    if family not in ("llama", "qwen2", "qwen3"):
        return
    # In memory, the same method gives the same model.
    model = AutoModelForCausalLM.from_pretrained(source)
    names = [f"model.layers.{i}.self_attn" for i in range(3)]
    group_heads(model, calibration=calibrate(model, [tokens()], names), **options)
    logits = load(tmp_path / "out")(tokens()).logits
    torch.testing.assert_close(logits, model.eval()(tokens()).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("family", "heads"), [("llama", 4), ("llama", 2), ("qwen3", 4)])
def test_uneven_groups_are_stored_with_their_map_and_never_read_as_even(
    family, heads, with_six_heads, tmp_path
):
    """Four groups do not divide six heads; in two, a stock class would find nothing amiss."""
    source, out = with_six_heads(family), tmp_path / "out"
    options = {"num_kv_heads": heads, "partition": "clustered", "calib": tokens()}
    report = convert(source, out, "gqa", **options)
    sizes = [layer["sizes"]["query_heads"] for layer in report.layers]
    assert any(len(set(each)) > 1 for each in sizes)
    with pytest.raises(RuntimeError, match="(?s)k_proj|mismatch"):
        AutoModelForCausalLM.from_pretrained(out)
    found = verify_folders(source, out, tokens())
    assert found.bytes_per_token == report.bytes_per_token
    loaded = [
        getattr(layer.self_attn, "kv_group_sizes", None) for layer in load_grouped(out).model.layers
    ]
    assert [list(each) for each in loaded if each] == [s for s in sizes if len(set(s)) > 1]


def test_a_resumed_conversion_ends_with_the_same_bytes(with_six_heads, tmp_path, monkeypatch):
    source = with_six_heads("llama")
    options = {"num_kv_heads": 2, "calib": tokens()}
    whole = convert(source, tmp_path / "whole", "gqa", **options)

    from efficient_attn.convert import to_gqa

    real, calls = to_gqa.group_layer, []

    def fails_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(to_gqa, "group_layer", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "cut", "gqa", **options)
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(to_gqa, "group_layer", real)
    with pytest.raises(ConversionError, match="num_kv_heads was 2 and is 3"):
        convert(source, tmp_path / "cut", "gqa", resume=True, **{**options, "num_kv_heads": 3})
    resumed = convert(source, tmp_path / "cut", "gqa", resume=True, **options)
    assert resumed.output_files == whole.output_files


def test_a_dry_run_reads_and_writes_nothing(with_six_heads, tmp_path):
    source = with_six_heads("llama")
    report = convert(source, tmp_path / "out", "gqa", num_kv_heads=3, dry_run=True)
    assert report.bytes_per_token == {"before": 3 * 144 * 4, "after": 3 * 72 * 4}
    assert any("weights alone" in warning for warning in report.warnings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 4}, "do not divide evenly into 4"),
        ({"num_kv_heads": 0}, "from 1 to 6"),
        ({"num_kv_heads": 7}, "from 1 to 6"),
        ({"num_kv_heads": 2, "pooling": "median"}, "pooling is 'median'"),
        ({"num_kv_heads": 2, "partition": "best"}, "partition is 'best'"),
        ({"num_kv_heads": 2, "dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    options, message, with_six_heads, tmp_path
):
    with pytest.raises(ValueError, match=message):
        convert(with_six_heads("llama"), tmp_path / "out", "gqa", **options)
    assert not list(tmp_path.iterdir())
