"""Partitions found by a search, beside all that there are."""

import pytest
import torch

from efficient_attn.convert.gqa.partition import clustered, pair_losses, searched


def all_partitions(heads, groups):
    """Every partition into so many groups, each once."""
    if len(heads) < groups or groups == 0:
        return
    if not heads:
        yield []
        return
    first, rest = heads[0], heads[1:]
    if groups == 1:
        yield [heads]
        return
    for found in all_partitions(rest, groups):
        for i, group in enumerate(found):
            yield [*found[:i], [first, *group], *found[i + 1 :]]
    for found in all_partitions(rest, groups - 1):
        yield [[first], *found]


def spread(points, group):
    some = points[group]
    return float((some - some.mean(0)).square().sum())


def total(points, groups):
    return sum(spread(points, group) for group in groups)


@pytest.fixture(params=range(4))
def points(request):
    torch.manual_seed(request.param)
    return torch.randn(7 + request.param % 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_the_search_finds_the_best(points, groups):
    count = len(points)
    loss = pair_losses(count, lambda pair: spread(points, pair))
    best = min(total(points, each) for each in all_partitions(list(range(count)), groups))
    found = searched(loss, groups, even=False)
    assert total(points, found) == pytest.approx(best)
    assert total(points, clustered(loss, groups)) >= best * (1 - 1e-12)
    if count % groups == 0:
        even = [
            total(points, each)
            for each in all_partitions(list(range(count)), groups)
            if len(set(map(len, each))) == 1
        ]
        found = searched(loss, groups, even=True)
        assert {len(group) for group in found} == {count // groups}
        assert total(points, found) == pytest.approx(min(even))


def test_clusters_are_found_whatever_their_size():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]]).double()
    of = torch.tensor([0, 1, 0, 0, 2, 1, 0, 0])
    points = centres[of] + 0.1 * torch.randn(8, 2).double()
    loss = pair_losses(8, lambda pair: spread(points, pair))
    assert clustered(loss, 3) == [[0, 2, 3, 6, 7], [1, 5], [4]]
    assert searched(loss, 3, even=False) == [[0, 2, 3, 6, 7], [1, 5], [4]]


def test_the_same_seed_gives_the_same_groups():
    loss = torch.rand(16, 16).double()
    loss = (loss + loss.mT).tolist()
    assert searched(loss, 4, even=True, seed=3) == searched(loss, 4, even=True, seed=3)
