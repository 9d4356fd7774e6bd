"""Checkpoints of every family as attention layers, and those that are not what they say."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from efficient_attn import ConversionError
from efficient_attn.convert import families
from efficient_attn.convert.checkpoint import INDEX, Checkpoint
from efficient_attn.convert.rope import inverse_frequencies, rope_parameters
from efficient_attn.convert.source import Source

from .conftest import FAMILIES, LLAMA3, SMALL, YARN

LONG = {"original_max_position_embeddings": 32, "rope_theta": 500.0}
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn with all": {
        **YARN,
        "beta_fast": 8,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn without room": {**YARN, "rope_theta": 10.0, "attention_factor": 1.3},
    "longrope": {
        **LONG,
        "rope_type": "longrope",
        "short_factor": [1.0 + i for i in range(6)],
        "long_factor": [2.0 + i for i in range(6)],
    },
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_have_the_bits_of_transformers(scaling):
    config = FAMILIES["llama"].__class__(**SMALL, rope_parameters=copy.deepcopy(SCALINGS[scaling]))
    told = json.loads(config.to_json_string())
    kind = told["rope_parameters"]["rope_type"]
    if kind == "default":
        theirs, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[kind](config)
    old = {k: v for k, v in told["rope_parameters"].items() if k != "rope_type"} | {"type": kind}
    old = {"rope_theta": old.pop("rope_theta"), "rope_scaling": old, "rope_parameters": None}
    for spelling in (told, told | old):
        full = families.complete(spelling)
        rope = rope_parameters(full, 10000.0)
        ours = inverse_frequencies(rope, full["head_dim"], full["max_position_embeddings"])
        assert torch.equal(ours[0], theirs)
        assert ours[1] == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_what_a_config_leaves_out_means_what_transformers_takes_it_for(kind):
    needed = {"model_type": kind, "num_hidden_layers": 30, "vocab_size": 32000}
    needed |= {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    theirs = AutoConfig.for_model(**needed)
    full = families.complete(needed)
    for name, value in full.items():
        if name == "head_dim":
            assert value == (getattr(theirs, "head_dim", None) or 128)
        elif name != "model_type" and hasattr(theirs, name) and "window" not in name:
            assert getattr(theirs, name) == value, name
    assert theirs.rope_parameters["rope_theta"] == families.FAMILIES[kind].default_theta
    for layer in (0, 27, 28, 29):
        kinds = getattr(theirs, "layer_types", None)
        slides = kinds[layer] == "sliding_attention" if kinds else True
        expected = getattr(theirs, "sliding_window", None) if slides else None
        assert families.FAMILIES[kind].window(full, layer) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_of_a_layer_is_the_one_of_the_model(saved, name):
    folder, model = saved(name)
    source = Source.open(Checkpoint.open(folder))
    assert source.num_layers == 3 and source.dtype == torch.float32
    named = set(source.outside_names())
    for i, layer in enumerate(model.model.layers):
        theirs, ours = layer.self_attn, source.attention(i)
        for part in ("query", "key", "value", "output"):
            linear = getattr(theirs, f"{part[0]}_proj")
            assert torch.equal(getattr(ours, part), linear.weight)
            bias = getattr(ours, f"{part}_bias")
            assert (bias is None) == (linear.bias is None)
            assert bias is None or torch.equal(bias, linear.bias)
        for part in ("query", "key"):
            norm, given = getattr(theirs, f"{part[0]}_norm", None), getattr(ours, f"{part}_norm")
            assert (given is None) == (norm is None)
            assert norm is None or torch.equal(given, norm.weight)
        assert ours.scale == theirs.scaling
        assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (6, 2, 12)
        assert ours.norm_eps == 1e-5
        expected = getattr(theirs, "sliding_window", getattr(model.config, "sliding_window", None))
        assert ours.window == expected
        rotary = model.model.rotary_emb
        assert torch.equal(ours.inverse_frequencies, rotary.inv_freq)
        assert ours.rotary_scale == pytest.approx(rotary.attention_scaling, rel=1e-15)
        named |= {*source.attention_names(i), *source.other_names(i)}
    assert named == set(source.checkpoint.tensors)


@pytest.fixture
def copied(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved("llama")[0], folder)
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder, edit):
    """All tensors in one file, after ``edit`` changed them."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    edit(tensors)
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")


def refused(folder, *words):
    with pytest.raises(ConversionError) as caught:
        Source.open(Checkpoint.open(folder))
    for word in words:
        assert word in str(caught.value)


KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(KEY), ["lacks 1 tensors", KEY]),
        (lambda t: t.update(extra=torch.zeros(1)), ["unknown 1 tensors", "extra"]),
        (lambda t: t.update({KEY: torch.zeros(24, 47)}), [KEY, "[24, 47]", "[24, 48]"]),
        (lambda t: t.update({KEY: torch.zeros(24, 48).long()}), [KEY, "int64"]),
    ],
)
def test_tensors_that_do_not_fit_the_config(copied, edit, words):
    edit_tensors(copied, edit)
    refused(copied, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama", "mixtral"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"num_hidden_layers": 4}, ["lacks 9 tensors", "model.layers.3"]),
        ({"num_key_value_heads": 4}, ["6 query heads", "4 key/value"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads is 0"]),
        ({"num_attention_heads": 10**12}, ["num_attention_heads"]),
        ({"hidden_size": "48"}, ["hidden_size is '48'"]),
        ({"hidden_size": True}, ["hidden_size is True"]),
        ({"head_dim": 9}, ["even"]),
        ({"head_dim": 1000}, ["shape"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"sliding_window": 0}, ["sliding_window"]),
        ({"layer_types": ["full_attention"]}, ["layer_types"]),
        ({"rope_parameters": {"rope_type": "new"}}, ["'new'", "llama3"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["llama3", "factor"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, ["not finite"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, ["linear"]),
        ({"partial_rotary_factor": 0.5}, ["whole heads"]),
        ({"rope_parameters": {"sliding_attention": {}}}, ["kinds of layers"]),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1]}}, ["pairs"]),
    ],
)
def test_configs_that_make_no_sense(copied, changes, words):
    edit_config(copied, **changes)
    refused(copied, *words)


def test_old_tables_of_frequencies_are_ignored(copied):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(copied, lambda t: t.update({name: torch.zeros(6)}))
    assert name not in Source.open(Checkpoint.open(copied)).attention_names(0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(copied, bad):
    def edit(tensors):
        tensors[KEY][3, 5] = bad

    edit_tensors(copied, edit)
    source = Source.open(Checkpoint.open(copied))
    source.attention(0)
    with pytest.raises(ConversionError, match=KEY):
        source.attention(1)


def test_tables_that_depend_on_the_length_are_told(copied):
    assert Source.open(Checkpoint.open(copied)).warnings == []
    edit_config(copied, rope_parameters=SCALINGS["dynamic"])
    (warning,) = Source.open(Checkpoint.open(copied)).warnings
    assert "dynamic" in warning
