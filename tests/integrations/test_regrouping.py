"""Other heads that compute the same: unread ones dropped, groups made even, equal ones shared."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from efficient_attn import HeadMap, UnsupportedError
from efficient_attn.integrations.grouped_checkpoints import groups_of, load_grouped
from efficient_attn.integrations.grouping import group_heads
from efficient_attn.integrations.regrouping import (
    collapse_equal_heads,
    export_even_groups,
    prune_empty_heads,
)
from efficient_attn.layers import DGQA, KDGQA, GroupedQueryAttention

SIZES = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"vocab_size": 96, "num_attention_heads": 8, "initializer_range": 0.3}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=8, **changes)).eval()


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


@torch.no_grad()
def run(model):
    return model(torch.arange(40).view(2, 20))[0]


def layers(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            GroupedQueryAttention(48, 12, head_map=HeadMap.from_group_sizes(list(each)))
            for each in sizes
        )
    )


def test_heads_that_nobody_reads_are_dropped_and_nothing_changes():
    model, x = layers([0, 5, 0, 7], [3, 4, 5]), torch.randn(2, 9, 48)
    before, weights = model(x), sum(p.numel() for p in model.parameters())
    assert prune_empty_heads(model) == {"0": 2, "1": 0}
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    # Two heads of 4 channels, of keys and of values, with their biases.
    assert weights - sum(p.numel() for p in model.parameters()) == 2 * 2 * 4 * (48 + 1)
    assert [m.num_key_heads for m in model] == [2, 3]


@pytest.mark.parametrize("kind", [KDGQA, DGQA])
def test_a_frozen_key_driven_layer_is_pruned_to_a_plain_one(kind):
    torch.manual_seed(0)
    layer = kind(48, 12, num_kv_heads=6, compat="khan2024")
    with torch.no_grad():
        layer.k_proj.weight[:8] *= 0.01
    model, x = nn.Sequential(layer), torch.randn(2, 9, 48)
    with pytest.raises(UnsupportedError, match="not frozen"):
        prune_empty_heads(model)
    model(x)
    layer.freeze()
    before, empty = model.eval()(x), int((layer.group_sizes == 0).sum())
    assert empty > 0 and prune_empty_heads(model) == {"0": empty}
    assert type(model[0]) is GroupedQueryAttention and not model[0].training
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_even_groups_are_made_of_copies_and_collapse_again():
    sizes, x = ([2, 6, 4], [4, 4, 4]), torch.randn(2, 9, 48)
    model = layers(*sizes)
    before = model(x)
    assert export_even_groups(model) == {"0": 6, "1": 6}
    assert all(m.q_to_k is None and m.num_key_heads == 6 for m in model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    report = collapse_equal_heads(model)
    assert [[2 * len(g) for g in layer.groups] for layer in report.layers] == [*map(list, sizes)]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("partition", "count"), [([0, 0, 0, 0, 1, 1, 2, 2], 4), ([0, 0, 0, 1, 1, 2, 2, 2], 8)]
)
def test_the_stock_class_loads_even_groups_and_gives_the_same(partition, count, tmp_path):
    model = llama()
    group_heads(model, 3, partition=partition)
    expected = run(model)
    model.save_pretrained(tmp_path / "uneven")
    loaded = load_grouped(tmp_path / "uneven")
    assert export_even_groups(loaded) == dict.fromkeys(groups_of(model.config.to_dict()), count)
    torch.testing.assert_close(run(loaded), expected, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "even")
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "even").eval()
    assert stock.config.num_key_value_heads == count and not groups_of(stock.config.to_dict())
    torch.testing.assert_close(run(stock), expected, rtol=1e-4, atol=1e-5)
    report = collapse_equal_heads(stock)
    share = 8 // count
    found = [[share * len(g) for g in layer.groups] for layer in report.layers]
    assert found == [[partition.count(g) for g in range(3)]] * 2, "the map is recovered"
    torch.testing.assert_close(run(stock), expected, rtol=1e-4, atol=1e-5)
    assert stock.config._attn_implementation == "efficient_attn"


def test_an_encoder_gets_all_its_heads_back(tmp_path):
    model = bert()
    group_heads(model, 3, partition=[0, 0, 0, 1, 1, 2, 2, 2])
    expected = run(model)
    assert set(export_even_groups(model).values()) == {8}
    model.save_pretrained(tmp_path / "even")
    stock = BertModel.from_pretrained(tmp_path / "even").eval()
    torch.testing.assert_close(run(stock), expected, rtol=1e-4, atol=1e-5)
    model = bert()
    group_heads(model, 3, partition=[0, 0, 0, 0, 1, 1, 2, 2])
    assert set(export_even_groups(model).values()) == {4}
    model.save_pretrained(tmp_path / "fewer")
    with pytest.raises(RuntimeError, match="mismatch"):
        BertModel.from_pretrained(tmp_path / "fewer")
    torch.testing.assert_close(run(load_grouped(tmp_path / "fewer")), run(model))


def test_equal_heads_that_are_no_neighbours_share_one():
    model = llama(attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = projection.weight.view(8, 8, -1)
                heads.copy_(heads[[0, 1, 0, 3, 1, 3, 0, 1]].clone())
    expected = run(model)
    other = copy.deepcopy(model)
    report = collapse_equal_heads(model)
    assert report.cache_ratio == 3 / 8
    assert report.layers[0].groups == ((0, 2, 6), (1, 4, 7), (3, 5))
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # a key head alone that differs in one number is a head of its own
        other.model.layers[0].self_attn.k_proj.weight[0, 0] += 1e-3
    assert collapse_equal_heads(other).layers[0].groups == ((0,), (1, 4, 7), (2, 6), (3, 5))


def test_maps_that_are_not_of_neighbours_are_refused():
    index = torch.tensor([0, 1, 0, 1])
    crossed = GroupedQueryAttention(16, 4, head_map=HeadMap.from_index(index))
    different = GroupedQueryAttention(16, 4, head_map=HeadMap.diff(4, k=1, v=2))
    for layer in (crossed, different):
        with pytest.raises(UnsupportedError, match="groups"):
            prune_empty_heads(nn.Sequential(layer))
