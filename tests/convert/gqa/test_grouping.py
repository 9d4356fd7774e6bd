"""Grouping loses nothing where nothing needs to be lost, and least where the rules say so."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from efficient_attn.convert.gqa import PARTITIONS, POOLINGS, InputMoments, group_layer
from efficient_attn.head_map import HeadMap
from tests.convert.gqa.layers import (
    DIM,
    HEADS,
    KINDS,
    WIDTH,
    layer,
    moments,
    output,
    project,
    tokens,
)

FREE = ("aligned", "svd", "fitted")


def same_function(weights, grouped, tolerance=1e-9):
    x = tokens()
    torch.testing.assert_close(
        output(grouped.weights, x, grouped.head_map), output(weights, x), rtol=0, atol=tolerance
    )


def error_of(weights, grouped, x):
    truth = output(weights, x)
    return float((output(grouped.weights, x, grouped.head_map) - truth).norm() / truth.norm())


def with_heads(weights, name, heads):
    """``weights`` with other keys or values, ``(g, d, D + 1)``: biases are the last column."""
    changed = {name: heads[..., :-1].reshape(-1, WIDTH)}
    if getattr(weights, f"{name}_bias") is not None:
        changed[f"{name}_bias"] = heads[..., -1].reshape(-1)
    return replace(weights, num_kv_heads=len(heads), **changed)


def heads_with_bias(weights, name):
    bias = getattr(weights, f"{name}_bias")
    bias = torch.zeros(len(getattr(weights, name))).double() if bias is None else bias
    joined = torch.cat((getattr(weights, name), bias[:, None]), 1)
    return joined.view(-1, DIM, WIDTH + 1)


def copies(weights, of):
    """A layer whose head ``i`` is head ``of[i]`` of ``weights``."""
    for name in ("key", "value"):
        weights = with_heads(weights, name, heads_with_bias(weights, name)[torch.tensor(of)])
    return weights


def rotation(pairs):
    """A random map of a key head that commutes with its rotary embedding, and is orthogonal."""
    angles = torch.rand(pairs, dtype=torch.float64) * 6
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    turn = torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))
    rest = torch.linalg.qr(torch.randn(DIM - 2 * pairs, DIM - 2 * pairs, dtype=torch.float64))[0]
    return torch.block_diag(turn, rest)


def any_map():
    return torch.randn(DIM, DIM, dtype=torch.float64) + 2 * torch.eye(DIM, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_as_many_heads_as_before_change_nothing(kind, pooling):
    weights = layer(**KINDS[kind])
    for partition in PARTITIONS:
        grouped = group_layer(weights, 6, partition=partition, pooling=pooling)
        assert grouped.weights is weights and grouped.is_even
        assert grouped.key_error < 1e-12 and grouped.value_error < 1e-12
    renamed = group_layer(weights, 6, partition=[3, 1, 0, 5, 4, 2], pooling=pooling)
    assert renamed.query_order.tolist() != list(range(HEADS))
    same_function(weights, renamed, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("of", [[0, 1, 2, 1, 2, 0], [2, 0, 0, 1, 0, 2]], ids=["even", "uneven"])
def test_equal_heads_are_found_and_lose_nothing(kind, pooling, of):
    weights = copies(layer(**KINDS[kind], groups=3), of)
    even = of.count(0) == 2
    for partition in ("clustered", "searched", "searched-even")[: 3 if even else 2]:
        grouped = group_layer(weights, 3, partition=partition, pooling=pooling)
        assert {frozenset(of[h] for h in group) for group in grouped.groups} == {
            frozenset([i]) for i in range(3)
        }
        assert grouped.is_even == even
        assert grouped.weights.key.shape == (3 * DIM, WIDTH)
        same_function(weights, grouped)
    if even:
        assert error_of(weights, group_layer(weights, 3, partition="consecutive"), tokens()) > 0.01


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "normalised"])
@pytest.mark.parametrize("pooling", FREE)
def test_heads_that_differ_by_what_can_be_undone_lose_nothing(kind, pooling):
    """Scores and outputs are those before, so the search finds such heads too."""
    of, pairs = [0, 1, 2, 1, 2, 0], KINDS[kind]["pairs"]
    weights = copies(layer(**KINDS[kind], groups=3), of)
    for name in ("key", "value"):
        # A head is given another basis; what reads it is left, so this is another function.
        changes = [rotation(pairs if name == "key" else 0) for _ in of]
        heads = torch.stack(changes) @ heads_with_bias(weights, name)
        weights = with_heads(weights, name, heads)
    grouped = group_layer(weights, 3, pooling=pooling, moments=moments(tokens(300)))
    assert {frozenset(of[h] for h in group) for group in grouped.groups} == {
        frozenset([i]) for i in range(3)
    }
    same_function(weights, grouped)
    assert grouped.key_error < 1e-9 and grouped.value_error < 1e-9
    assert error_of(weights, group_layer(weights, 3, pooling="mean"), tokens()) > 0.01


@pytest.mark.parametrize("pooling", ["svd", "fitted"])
def test_components_undo_what_no_rotation_does(pooling):
    weights = copies(layer(pairs=4, groups=3), [0, 1, 2, 0, 1, 2])
    stretched = torch.stack([any_map() for _ in range(6)]) @ heads_with_bias(weights, "value")
    weights = with_heads(weights, "value", stretched)
    gain = torch.rand(6, 1, 4, 1, dtype=torch.float64) + 0.3
    keys = (heads_with_bias(weights, "key").view(6, 2, 4, -1) * gain).view(6, DIM, -1)
    weights = with_heads(weights, "key", keys)
    same_function(weights, group_layer(weights, 3, pooling=pooling))
    assert error_of(weights, group_layer(weights, 3, pooling="aligned"), tokens()) > 0.01


@pytest.mark.parametrize("pooling", FREE)
def test_maps_that_do_not_commute_with_the_rotation_are_not_used(pooling):
    """Keys in another basis, which averages over pairs would undo and positions would notice."""
    weights = copies(layer(pairs=4, groups=3), [0, 1, 2, 0, 1, 2])
    keys = torch.stack([rotation(0) for _ in range(6)]) @ heads_with_bias(weights, "key")
    weights = with_heads(weights, "key", keys)
    grouped = group_layer(weights, 3, partition=[0, 1, 2, 0, 1, 2], pooling=pooling)
    assert grouped.key_error > 0.05 and grouped.value_error < 1e-9
    assert error_of(weights, grouped, tokens()) > 0.01
    # Without a rotation the same heads are equal.
    plain = replace(weights, inverse_frequencies=torch.zeros(0, dtype=torch.float64))
    same_function(plain, group_layer(plain, 3, partition=[0, 1, 2, 0, 1, 2], pooling=pooling))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_constant_that_all_keys_have_in_common_is_lost_without_harm(pooling):
    """Softmax does not see it, unless a rotation makes it depend on positions."""
    weights = copies(layer(pairs=0, groups=3, biases=True), [0, 1, 2, 0, 1, 2])
    weights = replace(weights, key_bias=torch.randn(6 * DIM, dtype=torch.float64))
    options = {"pooling": pooling, "moments": moments(tokens(300)), "partition": [0, 1, 2, 0, 1, 2]}
    same_function(weights, group_layer(weights, 3, **options))
    rotary = replace(weights, inverse_frequencies=torch.tensor([1.0, 0.5]).double())
    assert error_of(rotary, group_layer(rotary, 3, **options), tokens()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_the_projected_heads_and_the_rest_is_left(kind):
    weights, x = layer(**KINDS[kind]), tokens()
    grouped = group_layer(weights, 2, partition="consecutive", pooling="mean").weights
    for name in ("key", "value"):
        heads = project(weights, x, name).unflatten(0, (2, 3)).mean(1)
        torch.testing.assert_close(project(grouped, x, name), heads, rtol=1e-12, atol=1e-12)
    for name in ("query", "query_bias", "output", "output_bias"):
        before, after = getattr(weights, name), getattr(grouped, name)
        assert (before is None and after is None) or torch.equal(before, after)


def test_golden_averages():
    """Four heads of one channel, by hand."""
    weights = replace(
        layer(pairs=0),
        num_heads=4,
        num_kv_heads=4,
        query=torch.eye(4).double(),
        key=torch.tensor([[1.0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 2]]).double(),
        value=torch.tensor([[1.0, 1, 0, 0], [3, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 2]]).double(),
        output=torch.eye(4).double(),
    )
    expected = {
        "mean": [[2.0, 0, 0, 0], [0, 0, 2, 1]],
        "first": [[1.0, 0, 0, 0], [0, 0, 4, 0]],
        "norm": [[2.5, 0, 0, 0], [0, 0, 8 / 3, 2 / 3]],
    }
    for pooling, keys in expected.items():
        found = group_layer(weights, 2, partition="consecutive", pooling=pooling).weights
        torch.testing.assert_close(found.key, torch.tensor(keys).double())


@pytest.mark.parametrize("kind", ["rotary", "half turned", "not turned", "rotary, biases"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_errors_told_are_those_of_the_tokens(kind, pooling):
    """Of scores at every distance alike, and of what each head adds to the output."""
    weights, x = layer(**KINDS[kind]), tokens(400)
    grouped = group_layer(weights, 2, pooling=pooling, moments=moments(x))
    share, order = HEADS // 6, grouped.query_order
    value = project(weights, x, "value")[order // share]
    shared = project(grouped.weights, x, "value")[grouped.head_map.value_index()]
    before = weights.output.view(WIDTH, HEADS, DIM)[:, order].permute(1, 2, 0)
    after = grouped.weights.output.view(WIDTH, HEADS, DIM).permute(1, 2, 0)
    truth, got = value @ before, shared @ after
    measured = float((got - truth).square().sum() / truth.square().sum())
    assert measured == pytest.approx(grouped.value_error, rel=1e-3)

    query, key = project(weights, x, "query")[order], project(weights, x, "key")[order // share]
    new_query = project(grouped.weights, x, "query")
    new_key = project(grouped.weights, x, "key")[grouped.head_map.key_index()]
    pairs = KINDS[kind]["pairs"]
    if pairs == 0:
        key, new_key = (each - each.mean(1, keepdim=True) for each in (key, new_key))
    lost = square_of_scores(torch.cat((query, -new_query), -1), (key, new_key), pairs)
    measured = lost / square_of_scores(query, (key,), pairs)
    assert measured == pytest.approx(grouped.key_error, rel=1e-3)


def square_of_scores(query, keys, pairs):
    """Summed over every query and every key, whose pairs are turned by any angle alike.

    Four angles for each pair, in every combination, are as good as all angles for a square.
    """
    total = 0.0
    for turns in product([1, 1j, -1, -1j], repeat=pairs):
        turns = torch.tensor(turns, dtype=torch.complex128)
        moved = []
        for key in keys:
            z = torch.complex(key[..., :pairs], key[..., pairs : 2 * pairs]) * turns
            moved.append(torch.cat((z.real, z.imag, key[..., 2 * pairs :]), -1))
        key = torch.cat(moved, -1)
        total += float((query.mT @ query * (key.mT @ key)).sum())
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_each_rule_is_as_near_as_it_says(kind):
    """Judged by plain distance: components, aligned averages, averages, single heads."""
    from efficient_attn.convert.gqa.heads import heads_of
    from efficient_attn.convert.gqa.pooling import cost, pool

    for seed in range(5):
        torch.manual_seed(seed)
        weights, x = layer(**KINDS[kind]), tokens(300)
        for heads in heads_of(weights, moments(x).second):
            for group in ([0, 1], [1, 3, 4], list(range(6))):
                some = heads[group]
                own = {name: cost(some, pool(some, name)) for name in POOLINGS}
                if some.mixable:
                    assert own["fitted"] <= min(own.values()) * (1 + 1e-9)
                    assert own["fitted"] < own["mean"] * 0.99
                plain = replace(some, metric=torch.eye(DIM).double().expand_as(some.metric))
                by = {name: cost(plain, pool(plain, name)) for name in POOLINGS}
                chain = [by[name] for name in ("svd", "aligned", "mean", "first")]
                assert all(a <= b * (1 + 1e-9) for a, b in zip(chain, chain[1:], strict=False))
                assert by["mean"] <= by["norm"] * (1 + 1e-9)
                if some.mixable:
                    assert by["svd"] < by["aligned"] < by["mean"]


@pytest.mark.parametrize("pooling", FREE)
@pytest.mark.parametrize("pairs", [4, 2])
def test_what_is_read_commutes_with_the_rotation(pooling, pairs):
    from efficient_attn.convert.gqa.heads import heads_of
    from efficient_attn.convert.gqa.pooling import pool

    keys, _ = heads_of(layer(pairs=pairs), moments(tokens()).second)
    found, turn = pool(keys, pooling), rotation(pairs)
    turn[2 * pairs :, 2 * pairs :] = torch.eye(DIM - 2 * pairs)
    for maps in (found.read, found.write.transpose(0, 1)):
        torch.testing.assert_close(maps @ turn, turn @ maps, rtol=1e-10, atol=1e-10)
        assert (maps - torch.eye(DIM)).abs().max() > 0.1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_normalised_keys_are_averaged(pooling):
    weights = layer(**KINDS["normalised"])
    partition = [0, 0, 1, 1, 0, 1]
    options = {"partition": partition, "moments": moments(tokens())}
    grouped = group_layer(weights, 2, pooling=pooling, **options)
    if pooling in FREE:
        average = group_layer(weights, 2, pooling="mean", **options)
        assert torch.equal(grouped.weights.key, average.weights.key)
        assert torch.equal(grouped.weights.query, average.weights.query)
        assert not torch.equal(grouped.weights.value, average.weights.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_weights_keep_their_type_and_are_rounded_once(dtype, pooling):
    weights = layer(pairs=4, biases=True, dtype=dtype)
    exact = replace(
        weights,
        **{k: v.double() for k, v in vars(weights).items() if torch.is_tensor(v)},
    )
    options = {"partition": [0, 1, 1, 0, 0, 1], "pooling": pooling, "moments": moments(tokens())}
    found, truth = (group_layer(each, 2, **options).weights for each in (weights, exact))
    for name, tensor in vars(found).items():
        if torch.is_tensor(tensor) and name != "inverse_frequencies":
            assert tensor.dtype == dtype and tensor.is_contiguous()
            assert torch.equal(tensor, getattr(truth, name).to(dtype)), name


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["key", "value"])
def test_heads_of_zeros_give_finite_weights(pooling, name):
    weights = layer()
    weights = replace(weights, **{name: torch.zeros_like(getattr(weights, name))})
    grouped = group_layer(weights, 2, pooling=pooling)
    assert all(x.isfinite().all() for x in vars(grouped.weights).values() if torch.is_tensor(x))
    assert 0 <= grouped.key_error < 3 and 0 <= grouped.value_error < 3


def test_uneven_groups_are_stored_as_a_map():
    weights = layer(groups=6)
    grouped = group_layer(weights, 3, partition=[0, 0, 2, 0, 1, 2])
    assert not grouped.is_even
    assert grouped.groups == ((0, 1, 3), (4,), (2, 5))
    expected = HeadMap.from_group_sizes([6, 2, 4])
    assert torch.equal(grouped.head_map.q_to_k, expected.q_to_k)
    assert grouped.query_order.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 4, 5, 10, 11]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 0}, "from 1 to 6"),
        ({"num_kv_heads": 7}, "from 1 to 6"),
        ({"num_kv_heads": True}, "True"),
        ({"num_kv_heads": 4}, "clustered"),
        ({"num_kv_heads": 4, "partition": "consecutive"}, "6 heads do not divide evenly into 4"),
        ({"partition": "best"}, "searched-even"),
        ({"pooling": "median"}, "fitted"),
        ({"partition": [0, 0, 1]}, "each of 6 heads"),
        ({"partition": [0, 0, 0, 0, 0, 0]}, "no group may be empty"),
        ({"partition": [0, 0, 0, 0, 1, 2]}, "groups 0 to 1"),
    ],
)
def test_what_is_wrong_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        group_layer(layer(), **{"num_kv_heads": 2, **options})


def test_moments_are_those_of_all_tokens_together():
    x = tokens(60).view(3, 20, WIDTH)
    parts = InputMoments(WIDTH)
    for part in (x[:2], x[2, :7], x[2, 7:].float()):
        parts.add(part)
    flat = torch.nn.functional.pad(x.reshape(-1, WIDTH), (0, 1), value=1.0)
    torch.testing.assert_close(parts.second, flat.mT @ flat / 60, rtol=1e-6, atol=1e-6)
    assert parts.count == 60
    with pytest.raises(ValueError, match="7 wide"):
        parts.add(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="no token"):
        _ = InputMoments(3).second
