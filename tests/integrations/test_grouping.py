"""Grouped heads in models of transformers and timm: same results where heads were equal."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from efficient_attn import ConversionError, HeadMap, UnsupportedError
from efficient_attn.convert.gqa.learned import fold_averages
from efficient_attn.integrations.attention_sites import attention_sites
from efficient_attn.integrations.grouped_checkpoints import groups_of, load_grouped
from efficient_attn.integrations.grouping import calibrate, group_heads
from efficient_attn.layers import GroupedQueryAttention, RotaryEmbedding
from tests.integrations.conftest import FAMILIES

EVEN, UNEVEN = [0, 1, 2, 3, 1, 0, 3, 2], [0, 1, 1, 1, 2, 0, 3, 1]
NAMES = ["llama", "qwen2", "qwen3", "mistral", "bert", "vit", "timm", "ours"]
WHOLE = ("timm", "ours")


def set_heads(model, of):
    """Make key and value head ``i`` of every layer what head ``of[i]`` was."""
    with torch.no_grad():
        for site in attention_sites(model).values():
            weights = site.weights()
            for rows in (weights.key, weights.value, weights.key_bias, weights.value_bias):
                if rows is not None:
                    heads = rows.view(site.num_kv_heads, -1)
                    heads.copy_(heads[torch.tensor(of)].clone())
    return model


class Attention(nn.Module):
    """The part of timm's class of this name that transformers like ViT use."""

    def __init__(self, dim, num_heads, norm=nn.Identity):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = norm(), norm()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None, is_causal=False):
        heads = (3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


Attention.__module__ = "timm.layers.attention"


class Timm(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(32, 8, **kwargs) for _ in range(2)])

    def forward(self, x, attn_mask=None):
        for block in self.blocks:
            x = x + block(x, attn_mask=attn_mask)
        return x


class Ours(nn.Module):
    def __init__(self):
        super().__init__()
        rotary = RotaryEmbedding(2)  # half of a head is turned
        layers = (GroupedQueryAttention(32, 8, causal=True, rotary=rotary) for _ in range(2))
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def make(name):
    torch.manual_seed(0)
    if name in WHOLE:
        return (Timm if name == "timm" else Ours)().eval()
    model_class, config, _ = FAMILIES[name]
    config = copy.deepcopy(config)
    config.num_attention_heads = 8
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = 8
        config.head_dim = 8
    return model_class(config).eval()


@pytest.fixture
def batch(padded_batch):
    def made(name):
        if name == "vit":
            return {"pixel_values": torch.randn(2, 3, 16, 16)}
        return {"x": torch.randn(2, 9, 32)} if name in WHOLE else padded_batch("right")

    return made


@torch.no_grad()
def run(model, batch):
    out = model(**batch)
    out = out if torch.is_tensor(out) else out.logits
    mask = batch.get("attention_mask")
    return out if mask is None else out[mask.bool()]


@pytest.mark.parametrize("name", NAMES)
def test_as_many_heads_as_before_change_nothing(name, batch):
    model = make(name)
    ours, inputs = copy.deepcopy(model), batch(name)
    report = group_heads(ours, 8, calibration=[inputs])
    assert report.cache_ratio == 1
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name in WHOLE else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(run(ours, inputs), run(model, inputs), **tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_equal_heads_share_one_and_nothing_changes(name, of, batch):
    model = set_heads(make(name), of)
    ours, inputs = copy.deepcopy(model), batch(name)
    partition = "searched-even" if of == EVEN else "searched"
    report = group_heads(ours, 4, partition=partition, calibration=[inputs])
    assert report.cache_ratio == 0.5
    for layer in report.layers:
        assert {frozenset(of[h] for h in group) for group in layer.groups} == {
            frozenset([i]) for i in range(4)
        }
    for site in attention_sites(ours).values() if of == EVEN and name not in WHOLE else ():
        assert site.num_kv_heads == 4
    expected = run(model, inputs)
    implementations = ["efficient_attn"] if of == UNEVEN else ["sdpa", "efficient_attn"]
    if name in ("llama", "qwen2", "qwen3", "mistral") and of == EVEN:
        implementations.append("eager")
    for implementation in implementations if name not in WHOLE else [None]:
        if implementation:
            ours.set_attn_implementation(implementation)
        torch.testing.assert_close(run(ours, inputs), expected, rtol=1e-3, atol=2e-4)
    # The test can fail: other heads are not equal.
    other = copy.deepcopy(model)
    group_heads(other, 4, partition=[0, 0, 1, 1, 2, 2, 3, 3], pooling="first")
    assert (run(other, inputs) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("of", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_generation_with_a_cache_gives_the_same_tokens(of, padded_batch):
    model = set_heads(make("llama"), of)
    ours, inputs = copy.deepcopy(model), padded_batch("left")
    group_heads(ours, 4, partition="searched")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(**inputs, **options), model.generate(**inputs, **options))
    out = ours(**inputs, use_cache=True)
    assert out.past_key_values.layers[0].keys.shape[1] == 4


def test_even_groups_are_loaded_by_the_stock_class(tmp_path, padded_batch):
    model, inputs = make("llama"), padded_batch("none")
    group_heads(model, 2, partition="searched-even", calibration=[inputs])
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_key_value_heads == 2
    assert torch.equal(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize("groups", [4, 3])
def test_uneven_groups_never_load_as_even_ones(tmp_path, groups):
    model = make("llama")
    sizes = [0, 0, 0, 0, 0, 1, 2, 3] if groups == 4 else [0, 0, 0, 0, 1, 1, 1, 2]
    group_heads(model, groups, partition=sizes)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="(?s)k_proj|mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "bert", "vit"])
@pytest.mark.parametrize("of", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_what_no_stock_class_loads_is_loaded_with_its_groups(name, of, batch, tmp_path):
    model, inputs = make(name), batch(name)
    stock = of == EVEN and name not in ("bert", "vit")
    if stock:  # as one layer of several
        group_heads(model, 4, partition=of, layers=list(attention_sites(model))[:1])
    else:
        group_heads(model, 4, partition=of)
    model.save_pretrained(tmp_path)
    loaded = load_grouped(tmp_path)
    assert type(loaded).__name__ == type(model).__name__
    torch.testing.assert_close(run(loaded, inputs), run(model, inputs), rtol=1e-4, atol=1e-4)
    # And once more: what was loaded is saved as it was.
    loaded.save_pretrained(tmp_path / "again")
    assert groups_of(load_grouped(tmp_path / "again").config.to_dict()) == groups_of(
        model.config.to_dict()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: groups.clear(), "says nothing of groups"),
        (lambda groups: groups.update({"model.layers.0.self_attn": "2"}), "whole numbers"),
        (lambda groups: groups.update({"model.layers.0.self_attn": [7, 2]}), "must hold 8"),
        (lambda groups: groups.update({"model.layers.0.self_attn": [7, 1]}), "do not fit"),
        (lambda groups: groups.update({"nowhere": [8]}), "nowhere"),
    ],
)
def test_groups_that_do_not_fit_are_refused(change, message, tmp_path):
    model = make("llama")
    group_heads(model, 4, partition=UNEVEN)
    change(model.config.efficient_attn["groups"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=message):
        load_grouped(tmp_path)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "efficient_attn_hyper"])
def test_uneven_groups_refuse_what_would_take_them_for_even(implementation, padded_batch):
    model = make("llama")
    group_heads(model, 4, partition=UNEVEN)
    model.set_attn_implementation(implementation)
    with pytest.raises(UnsupportedError, match="uneven groups"):
        model(**padded_batch("none"))


def test_moments_are_those_of_tokens_that_are_not_padding(padded_batch):
    model, inputs = make("bert"), padded_batch("right")
    layer = list(attention_sites(model))[0]
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda m, args: seen.append(args))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    tokens = seen[0][0][inputs["attention_mask"].bool()].double()
    found = calibrate(model.train(), [inputs], [layer])[layer]
    assert model.training and found.count == len(tokens)
    torch.testing.assert_close(found.second[-1, :-1], tokens.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.second[:-1, :-1], tokens.mT @ tokens / len(tokens), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="calibration is empty"):
        calibrate(model, [], [layer])


@pytest.mark.parametrize("name", ["llama", "qwen2", "bert", "timm", "ours"])
@pytest.mark.parametrize("per", ["head", "row", "column"])
def test_learned_averages_start_at_the_mean_learn_and_fold(name, per, batch):
    model, average = make(name), make(name)
    inputs = batch(name)
    options = {"partition": [0, 0, 1, 1, 1, 1, 0, 1]}
    group_heads(average, 2, pooling="mean", **options)
    group_heads(model, 2, pooling="learned", learned_per=per, **options)
    torch.testing.assert_close(run(model, inputs), run(average, inputs), rtol=1e-3, atol=1e-4)
    out = model(**inputs)
    (out if torch.is_tensor(out) else out.logits).square().sum().backward()
    # A bias that is zero for all heads, as some are at first, has no weights to learn.
    learned = {n: p for n, p in model.named_parameters() if n.endswith("weight.0.weight")}
    assert learned and all(p.grad.abs().max() > 0 for p in learned.values())
    with torch.no_grad():
        for parameter in learned.values():
            parameter -= 0.01 * parameter.grad / parameter.grad.abs().max()
    before = run(model, inputs)
    assert (before - run(average, inputs)).abs().max() > 1e-4
    assert fold_averages(model) > 0 == fold_averages(model)
    assert not any("parametrizations" in n for n, _ in model.named_parameters())
    torch.testing.assert_close(run(model, inputs), before, rtol=1e-4, atol=1e-5)
    shapes = {n: p.shape for n, p in average.named_parameters()}
    assert shapes == {n: p.shape for n, p in model.named_parameters()}


def test_norms_of_timm_keep_their_place():
    torch.manual_seed(0)
    model = set_heads(Timm(norm=lambda: nn.LayerNorm(4, elementwise_affine=False)).eval(), EVEN)
    ours, inputs = copy.deepcopy(model), {"x": torch.randn(2, 9, 32)}
    report = group_heads(ours, 4, pooling="svd")
    torch.testing.assert_close(run(ours, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)
    mask = torch.ones(9, 9).tril().bool()
    inputs["attn_mask"] = mask
    torch.testing.assert_close(run(ours, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)
    assert "8 to 4" in str(report)


def test_some_layers_alone(padded_batch):
    model, inputs = make("llama"), padded_batch("right")
    name = "model.layers.1.self_attn"
    group_heads(model, 2, layers=[name])
    assert [s.num_kv_heads for s in attention_sites(model).values()] == [8, 2]
    assert model.config.num_key_value_heads == 8
    assert run(model, inputs).isfinite().all()


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (None, {"num_kv_heads": 3}, ValueError, "8 heads do not divide evenly into 3"),
        (None, {"layers": ["nowhere"]}, ValueError, "nowhere"),
        (None, {"pooling": "learned", "learned_per": "layer"}, ValueError, "column"),
        ("wrap", {}, UnsupportedError, "k_proj is a Sequential"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(change, options, error, message, padded_batch):
    model, inputs = make("llama"), padded_batch("right")
    if change:
        layer = model.model.layers[1].self_attn
        layer.k_proj = nn.Sequential(layer.k_proj)
    before = run(model, inputs)
    with pytest.raises(error, match=message):
        group_heads(model, **{"num_kv_heads": 2, **options})
    assert torch.equal(run(model, inputs), before)
    assert model.config.num_key_value_heads == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_map": HeadMap.from_group_sizes([5, 3])}, "not in even groups"),
        ({"head_map": HeadMap.diff(8, k=2, v=4)}, "not in even groups"),
        ({"rotary": RotaryEmbedding(4, interleaved=True)}, "channels f and f"),
    ],
)
def test_layers_of_ours_that_cannot_be_grouped_say_why(options, message):
    model = nn.Sequential(GroupedQueryAttention(32, 8, **options))
    with pytest.raises(UnsupportedError, match=message):
        group_heads(model, 2)


def test_models_without_a_known_layer_are_refused():
    config = GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=50, n_positions=16)
    with pytest.raises(UnsupportedError, match="no attention layer of a known kind"):
        group_heads(GPT2LMHeadModel(config), 2)
