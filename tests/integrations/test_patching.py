"""A patch reaches what it says and nothing else, and can be taken back."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from efficient_attn import UnsupportedError
from efficient_attn.integrations.patching import patch_model
from efficient_attn.layers import MultiheadAttention

TIGHT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def logits(decoder_batch, count_calls):
    """Logits of a model on one left-padded batch, and how often our attention ran."""
    batch = decoder_batch("left")

    def run(model):
        with torch.no_grad(), count_calls() as counter:
            out = model(**batch).logits
        return out[batch["attention_mask"].bool()], counter.calls

    return run


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_whole_model_and_back(family, logits, model_pair):
    _, model = model_pair(family)
    before = model.config._attn_implementation
    parameters = [id(parameter) for parameter in model.parameters()]
    expected, calls = logits(model)
    assert calls == 0
    patch = patch_model(model)
    got, calls = logits(model)
    assert calls == 2
    torch.testing.assert_close(got, expected, **TIGHT)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    patch.undo()
    patch.undo()
    got, calls = logits(model)
    assert calls == 0 and torch.equal(got, expected)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("layers", [[1], ["model.layers.0.self_attn"]])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_oss"])
def test_some_layers_and_back(family, layers, logits, model_pair):
    _, model = model_pair(family)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    expected, _ = logits(model)
    with patch_model(model, layers=layers) as patch:
        assert len(patch.report.replaced) == 1
        got, calls = logits(model)
        assert calls == 1
        torch.testing.assert_close(got, expected, **TIGHT)
    got, calls = logits(model)
    assert calls == 0 and torch.equal(got, expected)
    now = [module.config for module in model.modules() if hasattr(module, "config")]
    assert all(a is b for a, b in zip(now, configs, strict=True))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_some_layers_while_generating(cache, model_pair, padded_batch):
    """The masks stay those of sdpa, which has another reading of a missing one."""
    theirs, ours = model_pair("llama")
    patch_model(ours, layers=[0])
    for padding in ("none", "left"):
        options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
        options |= {"disable_compile": True, **padded_batch(padding)}
        assert torch.equal(ours.generate(**options), theirs.generate(**options))


def test_models_that_share_a_configuration_stay_apart(logits):
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    one, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    patch_model(one)
    assert logits(one)[1] == 2
    assert logits(other)[1] == 0
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"
    patched_configs = {id(module.config) for module in one.modules() if hasattr(module, "config")}
    assert len(patched_configs) == 1


def test_what_is_changed_in_between_outlives_an_undo(model_pair):
    _, model = model_pair("llama")
    with patch_model(model):
        model.config.use_cache = False
    assert model.config.use_cache is False


def test_patching_twice(model_pair):
    _, model = model_pair("llama")
    first = patch_model(model)
    second = patch_model(model)
    assert second.report.replaced == ()
    assert set(second.report.skipped.values()) == {"patched before, left as it is"}
    second.undo()
    assert model.config._attn_implementation == "efficient_attn"
    first.undo()
    assert model.config._attn_implementation == "sdpa"


def test_patching_the_rest_later(logits, model_pair):
    _, model = model_pair("llama")
    expected, _ = logits(model)
    first = patch_model(model, layers=[0])
    rest = patch_model(model)
    assert rest.report.replaced == ("model.layers.1.self_attn",)
    got, calls = logits(model)
    assert calls == 2
    torch.testing.assert_close(got, expected, **TIGHT)
    rest.undo()
    assert logits(model)[1] == 1
    first.undo()
    assert logits(model)[1] == 0


def test_the_report(model_pair):
    _, model = model_pair("llama")
    report = patch_model(model, layers=[1]).report
    assert report.replaced == ("model.layers.1.self_attn",)
    assert report.skipped == {"model.layers.0.self_attn": "not asked for"}
    assert str(report).splitlines() == [
        "layer                     class                     detail",
        "model.layers.0.self_attn  LlamaAttention  skipped   not asked for",
        "model.layers.1.self_attn  LlamaAttention  replaced  was sdpa",
        "1 of 2 attention layers replaced",
    ]
    _, model = model_pair("bert")
    model.bert.encoder.layer[0].attention.self.dropout.p = 0.1
    model.bert.encoder.layer[1].attention.self.dropout.p = 0.1
    (row,) = str(patch_model(model).report).splitlines()[1:-1]
    assert row == (
        "bert.encoder.layer.0-1.attention.self  BertSelfAttention  replaced  "
        "was sdpa; its dropout of 0.1 is refused in training"
    )


def test_models_inside_other_modules(model_pair):
    _, model = model_pair("llama")
    wrapped = nn.ModuleDict({"inner": model, "head": nn.Linear(2, 2)})
    with patch_model(wrapped) as patch:
        assert patch.report.replaced[0] == "inner.model.layers.0.self_attn"
        assert model.config._attn_implementation == "efficient_attn"
    assert model.config._attn_implementation == "sdpa"


def test_models_with_several_parts(count_calls):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        ),
        image_token_index=95,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.cat((torch.full((1, 16), 95), torch.randint(0, 90, (1, 5))), dim=1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():
        expected = model(**inputs).logits
        with patch_model(model) as patch, count_calls() as counter:
            got = model(**inputs).logits
    assert len(patch.report.replaced) == 4
    assert counter.calls >= 3  # the vision tower's last layer may be left out
    torch.testing.assert_close(got, expected, **TIGHT)
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def bloom():
    return BloomModel(BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4))


def test_what_cannot_be_replaced():
    model = nn.Sequential(bloom(), nn.MultiheadAttention(8, 2))
    with pytest.raises(UnsupportedError) as error:
        patch_model(model)
    assert len(error.value.reasons) == 2
    assert type(model[1]) is nn.MultiheadAttention  # nothing was changed
    report = patch_model(model, strict=False).report
    assert report.replaced == ("1",)
    assert set(report.skipped) == {"0.h.0.self_attention", "0.h.1.self_attention"}


def test_masks_that_only_one_implementation_reads(model_pair):
    _, model = model_pair("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedError, match="flex_attention.*sdpa"):
        patch_model(model, layers=[0])
    assert len(patch_model(model).report.replaced) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "fast"}, "accepted: 'exact', 'hyper'"),
        ({"layers": [2]}, "from 0 to 1"),
        ({"layers": ["model.layers.7.self_attn"]}, "model.layers.0.self_attn"),
    ],
)
def test_wrong_arguments(options, message, model_pair):
    _, model = model_pair("llama")
    with pytest.raises(ValueError, match=message):
        patch_model(model, **options)


def test_a_model_without_attention():
    with pytest.raises(UnsupportedError, match="no attention layer in Linear"):
        patch_model(nn.Linear(2, 2), strict=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_encoder(batch_first, training, count_calls):
    """In evaluation too, where torch would run a fused kernel of its own."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).train(training)
    tokens = torch.randn(3, 7, 32) if batch_first else torch.randn(7, 3, 32)
    padding = torch.arange(7) >= torch.tensor([7, 4, 5])[:, None]
    real = ~padding if batch_first else ~padding.T

    def run():
        with torch.set_grad_enabled(training), count_calls() as counter:
            out = model(tokens, src_key_padding_mask=padding)
        return out[real], counter.calls

    expected, calls = run()
    assert calls == 0
    with patch_model(model) as patch:
        assert patch.report.replaced == ("layers.0.self_attn", "layers.1.self_attn")
        assert type(model.layers[0].self_attn) is MultiheadAttention
        got, calls = run()
        assert calls == 2
        torch.testing.assert_close(got, expected, **TIGHT)
        assert patch_model(model).report.replaced == ()
    got, calls = run()
    assert calls == 0 and torch.equal(got, expected)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_torch_modules_need_no_transformers():
    program = """
        import sys
        sys.modules["transformers"] = None
        from torch import nn
        from efficient_attn.integrations.patching import patch_model
        print(patch_model(nn.Transformer(8, 2, 1, 1, 8)).report)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert "3 of 3 attention layers replaced" in done.stdout
