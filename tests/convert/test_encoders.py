"""BERT and vision transformers with fewer key heads: what is written, who loads it, who refuses."""

import json
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from efficient_attn import ConversionError
from efficient_attn.convert import convert
from efficient_attn.convert.checkpoint import INDEX
from efficient_attn.convert.encoder_activations import EncoderActivations
from efficient_attn.convert.pipeline import open_source
from efficient_attn.integrations.encoder_verification import load_encoder, verify_encoders
from efficient_attn.integrations.grouped_checkpoints import load_grouped
from efficient_attn.integrations.grouping import group_heads
from efficient_attn.integrations.timm_checkpoints import load_timm
from tests.convert.encoders import (
    ENCODERS,
    HEADS,
    LAYERS,
    VisionTransformer,
    inputs_of,
    save,
    tensors,
)

NAMES = [*ENCODERS, "timm"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(name)`` gives a folder and its model, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("encoders") / name
            made[name] = folder, save(name, folder)
        return made[name]

    return get


@pytest.fixture
def copied(saved, tmp_path):
    def get(name):
        shutil.copytree(saved(name)[0], tmp_path / "model")
        return tmp_path / "model"

    return get


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    """timm is not installed; a stand-in makes the model of its names."""
    module = types.ModuleType("timm")
    module.create_model = lambda name, pretrained, **args: VisionTransformer(**args)
    monkeypatch.setitem(sys.modules, "timm", module)


@torch.no_grad()
def result(model, given):
    out = model(given)
    return out if isinstance(out, torch.Tensor) else out[0]


def layer_inputs(model, name, given):
    """What enters each layer of the model, and what leaves the last."""
    if name != "timm":
        with torch.no_grad():
            return model(given, output_hidden_states=True).hidden_states
    states = []
    hooks = [
        block.register_forward_hook(lambda block, args, out: states.append((args[0], out)))
        for block in model.blocks
    ]
    result(model, given)
    for hook in hooks:
        hook.remove()
    return [*(entered for entered, _ in states), states[-1][1]]


@pytest.mark.parametrize("name", NAMES)
def test_what_flows_is_what_flows_in_the_model(name, saved):
    folder, model = saved(name)
    given = inputs_of(name)
    source = open_source(folder)
    flow = EncoderActivations(source, given, batch=2)
    for layer, states in enumerate(layer_inputs(model, name, given)):
        torch.testing.assert_close(flow._states, states, rtol=1e-4, atol=1e-4)
        if layer < LAYERS:
            flow.advance()
    assert source.parameters == sum(p.numel() for p in model.parameters())
    flow.restart()
    entering = torch.cat(list(flow.inputs()))
    seen = []
    module = dict(model.named_modules())[source.family.layer_name(source.config, 0)]
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    result(model, given)
    hook.remove()
    torch.testing.assert_close(entering, seen[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_as_many_heads_are_the_same_tensors_and_the_stock_class_loads_them(name, saved, tmp_path):
    folder, model = saved(name)
    report = convert(folder, tmp_path / "out", "gqa", num_kv_heads=HEADS, calib=inputs_of(name))
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not report.warnings and report.parameters["before"] == report.parameters["after"]
    loaded = load_encoder(tmp_path / "out")
    assert type(loaded) is type(model)
    assert torch.equal(result(loaded, inputs_of(name)), result(model, inputs_of(name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("heads", "partition", "pooling"),
    [(3, "consecutive", "mean"), (2, "searched-even", "fitted"), (4, "clustered", "aligned")],
)
def test_fewer_heads_are_those_of_the_model_in_memory(
    name, heads, partition, pooling, saved, tmp_path
):
    folder, _ = saved(name)
    given, out = inputs_of(name), tmp_path / "out"
    options = {"partition": partition, "pooling": pooling}
    report = convert(folder, out, "gqa", num_kv_heads=heads, calib=given, **options)
    loaded, other = load_grouped(out), load_encoder(folder)
    found = group_heads(other, heads, calibration=[given], **options)
    sizes = [layer["sizes"]["query_heads"] for layer in report.layers]
    assert sizes == [list(map(len, layer.groups)) for layer in found.layers]
    assert any(len(set(each)) > 1 for each in sizes) == (heads == 4)
    torch.testing.assert_close(result(loaded, given), result(other, given), rtol=1e-3, atol=1e-3)
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters["after"]
    assert report.bytes_per_token["after"] * HEADS == report.bytes_per_token["before"] * heads
    config = json.loads((out / "config.json").read_text())
    assert list(config["efficient_attn"]["groups"].values()) == sizes


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "vit", "vit-classes", "vit-new-names"])
@pytest.mark.parametrize(("heads", "partition"), [(3, "consecutive"), (4, "clustered")])
def test_no_stock_class_takes_fewer_heads_for_something_else(
    name, heads, partition, saved, tmp_path
):
    folder, model = saved(name)
    convert(folder, tmp_path / "out", "gqa", num_kv_heads=heads, partition=partition)
    with pytest.raises(RuntimeError, match="(?s)mismatch"):
        type(model).from_pretrained(tmp_path / "out")


def test_the_stock_model_of_timm_refuses_fewer_heads(saved, tmp_path):
    folder, model = saved("timm")
    convert(folder, tmp_path / "out", "gqa", num_kv_heads=3)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*blocks.0.attn.qkv.weight"):
        model.load_state_dict(tensors(tmp_path / "out"))
    with pytest.raises(ConversionError, match="attn.qkv.weight"):
        load_timm(tmp_path / "out", {})
    groups = {f"blocks.{i}.attn": [3, 2, 1] for i in range(LAYERS)}
    uneven = load_timm(tmp_path / "out", groups)
    even = load_grouped(tmp_path / "out")
    difference = result(uneven, inputs_of("timm")) - result(even, inputs_of("timm"))
    assert difference.abs().max() > 1e-3, "the map matters"
    with pytest.raises(ConversionError, match="must hold 6 query heads"):
        load_timm(tmp_path / "out", {"blocks.0.attn": [3, 2]})
    with pytest.raises(ConversionError, match="is no layer"):
        load_timm(tmp_path / "out", {"blocks.7.attn": [3, 3]})


@pytest.mark.parametrize("name", ["bert-mlm", "vit", "timm"])
def test_similarity_falls_with_the_heads(name, saved, tmp_path):
    folder, _ = saved(name)
    given, found = inputs_of(name, 12), {}
    for heads in (HEADS, 3, 1):
        out = tmp_path / str(heads)
        convert(folder, out, "gqa", num_kv_heads=heads, calib=inputs_of(name))
        found[heads] = verify_encoders(folder, out, given, batch=5)
    assert found[HEADS].mean_cosine == pytest.approx(1, abs=1e-6)
    assert found[HEADS].token_cosine == pytest.approx(1, abs=1e-6)
    assert 1 - 1e-4 > found[3].mean_cosine > found[1].mean_cosine
    assert found[1].min_cosine <= found[1].mean_cosine
    assert found[1].broken_bounds(min_cosine=0.9999) and not found[1].broken_bounds()
    assert (found[HEADS].top1_agreement == 1) if name != "vit" else not found[1].top1_agreement
    before, after = found[3].parameters["before"], found[3].parameters["after"]
    assert before > after and "mean cosine" in found[3].markdown()


def test_a_resumed_conversion_ends_with_the_same_bytes(saved, tmp_path, monkeypatch):
    from efficient_attn.convert import to_gqa

    options = {"num_kv_heads": 2, "calib": inputs_of("bert")}
    whole = convert(saved("bert")[0], tmp_path / "whole", "gqa", **options)
    real, calls = to_gqa.group_layer, []

    def fails_at_the_second(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(to_gqa, "group_layer", fails_at_the_second)
    with pytest.raises(ZeroDivisionError):
        convert(saved("bert")[0], tmp_path / "cut", "gqa", **options)
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(to_gqa, "group_layer", real)
    resumed = convert(saved("bert")[0], tmp_path / "cut", "gqa", resume=True, **options)
    assert resumed.output_files == whole.output_files


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder, edit):
    found = tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    edit(found)
    save_file(found, folder / "model.safetensors")


def refused(folder, *words):
    with pytest.raises(ConversionError) as caught:
        convert(folder, folder.parent / "out", "gqa", num_kv_heads=2)
    assert all(word in str(caught.value) for word in words), caught.value
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


KEYS = {
    "bert-mlm": "bert.encoder.layer.1.attention.self.key.weight",
    "vit": "encoder.layer.1.attention.attention.key.weight",
    "timm": "blocks.1.attn.qkv.weight",
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("what", ["missing", "extra", "misshapen", "whole numbers", "nan"])
def test_tensors_that_do_not_fit(name, what, copied):
    folder, key = copied(name), KEYS[name]
    edits = {
        "missing": (lambda t: t.pop(key), ["lacks 1 tensors", key]),
        "extra": (lambda t: t.update({key + ".x": torch.zeros(1)}), ["unknown 1 tensors"]),
        "misshapen": (lambda t: t.update({key: torch.zeros(48, 47)}), [key, "[48, 47]"]),
        "whole numbers": (lambda t: t.update({key: t[key].long()}), [key, "int64"]),
        "nan": (lambda t: t[key].view(-1)[3].fill_(torch.nan), [key, "not finite"]),
    }
    edit, words = edits[what]
    edit_tensors(folder, edit)
    if what != "nan":
        refused(folder, *words)
        return
    with pytest.raises(ConversionError, match="not finite"):
        convert(folder, folder.parent / "out", "gqa", num_kv_heads=2)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bert", {"num_attention_heads": 5}, ["48 channels", "5 heads"]),
        ("bert", {"num_hidden_layers": 10**6}, ["num_hidden_layers is 1000000"]),
        ("bert", {"vocab_size": "96"}, ["vocab_size is '96'"]),
        ("bert", {"architectures": None}, ["no architectures", "BertModel"]),
        ("bert", {"is_decoder": True}, ["decoder"]),
        ("bert", {"position_embedding_type": "relative_key"}, ["relative"]),
        ("bert", {"layer_norm_eps": 0}, ["layer_norm_eps"]),
        ("bert", {"model_type": ["bert"]}, ["model_type"]),
        ("bert", {"auto_map": {}}, ["auto_map"]),
        ("vit", {"image_size": 32}, ["position_embeddings", "[1, 65, 48]"]),
        ("vit", {"image_size": [16, 0]}, ["image_size is 0"]),
        ("vit", {"qkv_bias": 1}, ["qkv_bias is 1"]),
        ("timm", {"architecture": "resnet50"}, ["resnet50", "vit_base_patch16_224"]),
        ("timm", {"architecture": ["vit"]}, ["vit_base_patch16_224"]),
        ("timm", {"model_args": {"act_layer": "relu"}}, ["act_layer"]),
        ("timm", {"model_args": [1]}, ["model_args"]),
        ("timm", {"model_args": {}}, ["192 wide", "48", "num_heads"]),
        ("timm", {"model_args": {"num_heads": 7}}, ["48 channels", "7 heads"]),
    ],
)
def test_configs_that_make_no_sense(name, changes, words, copied):
    folder = copied(name)
    edit_config(folder, **changes)
    refused(folder, *words)


def test_an_index_that_points_outside_and_pickles_are_refused(copied, tmp_path):
    folder = copied("vit")
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "plain name")
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(folder, "pickles")


@pytest.mark.parametrize("to", ["mla", "diffqkv"])
def test_other_conversions_say_that_they_are_for_decoders(to, saved, tmp_path):
    options = {"key_heads": 2} if to == "diffqkv" else {}
    with pytest.raises(ConversionError, match="'bert' is an encoder.*gqa"):
        convert(saved("bert")[0], tmp_path / "out", to, **options)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("bert", torch.zeros(2, 65).long(), "64 positions"),
        ("bert", torch.full((2, 8), 96), "96 known"),
        ("vit", torch.zeros(2, 3, 16, 16), r"\(images, 3, 16, 8\)"),
        ("vit", torch.zeros(2, 3, 16, 8).long(), "floating"),
    ],
)
def test_inputs_that_do_not_fit(name, given, message, saved, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert(saved(name)[0], tmp_path / "out", "gqa", num_kv_heads=2, calib=given)
    assert not list(tmp_path.iterdir())


def test_timm_that_is_not_there_is_asked_for(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConversionError, match="pip install timm"):
        load_timm(saved("timm")[0], {})


def test_sizes_of_a_model_of_timm_are_checked_before_they_are_used(copied):
    folder = copied("timm")
    name = "patch_embed.proj.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(48, 3, 0, 0)}))
    refused(folder, "patch_size is 0")
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(48)}))
    refused(folder, name, "[48]")
