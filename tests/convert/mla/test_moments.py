import pytest
import torch
from einops import rearrange

from efficient_attn.convert.mla import MomentAccumulator, calibrate
from efficient_attn.convert.mla.pairs import query_gain
from efficient_attn.convert.mla.turning import (
    Distances,
    MeanProduct,
    turning_of_cache,
    turning_of_head,
)
from tests.convert.mla.layers import FAMILIES, layer
from tests.convert.mla.oracle import heads_of, softmax, turn_halves, turn_neighbours

every_family = pytest.mark.parametrize("family", FAMILIES)


def inputs(source, batch=3, tokens=30):
    width = source.query.shape[1]
    return torch.randn(batch, tokens, width, dtype=torch.float64) + torch.linspace(-1, 1, width)


@every_family
def test_moments_are_those_of_the_activations(family):
    source = layer(**FAMILIES[family])
    x = inputs(source)
    found = calibrate(source, x.split(1))
    rows = [heads_of(source, x.flatten(0, 1), name) for name in ("key", "value")]
    y = torch.cat([rearrange(each, "h n d -> n (h d)") for each in rows], -1)
    torch.testing.assert_close(found.mean, y.mean(0))
    torch.testing.assert_close(found.second, y.mT @ y / len(y))
    query = heads_of(source, x.flatten(0, 1), "query") * query_gain(source)
    torch.testing.assert_close(found.query, query.mT @ query / len(y))


@every_family
def test_attention_is_followed_as_the_layer_computes_it(family, monkeypatch):
    monkeypatch.setattr("efficient_attn.convert.mla.moments.QUERY_BLOCK", 7)
    source = layer(**FAMILIES[family])
    x = inputs(source, batch=1)[0]
    found = calibrate(source, [x[None]])
    query, key, value = (heads_of(source, x, name) for name in ("query", "key", "value"))
    query, key = (
        turn_halves(each, source.inverse_frequencies, source.rotary_scale) for each in (query, key)
    )
    share = source.num_heads // source.num_kv_heads
    key, value = (each.repeat_interleave(share, 0) for each in (key, value))
    score = source.scale * query @ key.mT
    p = softmax(score, source.window)
    by_distance = torch.stack(
        [p.diagonal(-n, dim1=1, dim2=2).sum(-1) / len(x) for n in range(len(x))], 1
    )
    torch.testing.assert_close(found.distances.shares, by_distance)

    # The weights of errors are the squared derivatives of the layer's output.
    output = rearrange(source.output, "e (h d) -> h e d", h=source.num_heads)
    for head in range(source.num_heads):

        def row(scores, head=head):
            return output[head] @ (softmax(scores, source.window) @ value[head]).mT

        slope = torch.autograd.functional.jacobian(row, score[head])
        expected = slope.square().sum() / len(x)
        torch.testing.assert_close(found.key_weight[head], expected)
    torch.testing.assert_close(found.value_weight, p.square().sum((1, 2)) / len(x))


def test_batches_and_weights_of_tokens_only_matter_by_their_sum():
    source = layer(biases=("key",))
    x = inputs(source, batch=4)
    whole = calibrate(source, [x])
    parts = calibrate(source, x.split(1), attended=4)
    for name in ("mean", "second", "query", "key_weight"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    count = torch.tensor([3.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    weighted = calibrate(source, [(x, count[:, None].expand(x.shape[:2]))])
    repeated = calibrate(source, [x.repeat_interleave(count.long(), 0)])
    torch.testing.assert_close(weighted.second, repeated.second)
    torch.testing.assert_close(weighted.mean, repeated.mean)


def test_memory_does_not_grow_with_tokens():
    source = layer()
    accumulator = MomentAccumulator(source)

    def held():
        return sum(x.numel() for x in vars(accumulator).values() if isinstance(x, torch.Tensor))

    accumulator.add(inputs(source))
    accumulator.attend(inputs(source)[0])
    before = held()
    for _ in range(5):
        accumulator.add(inputs(source))
        accumulator.attend(inputs(source)[0])
    assert held() == before


def test_nothing_has_no_moments():
    accumulator = MomentAccumulator(layer())
    with pytest.raises(ValueError, match=r"call add\(x\) first"):
        accumulator.finish()
    accumulator.add(inputs(layer()))
    with pytest.raises(ValueError, match=r"call attend\(x\) first"):
        accumulator.finish()


@pytest.mark.parametrize("rotary", [1.0, 0.5])
def test_mean_products_over_distances_are_sums(rotary):
    source = layer(**FAMILIES["half turned" if rotary < 1 else "llama"])
    shares = torch.rand(source.num_heads, 9, dtype=torch.float64)
    distances = Distances(shares / shares.sum(-1, keepdim=True))
    frequencies = torch.tensor([1.0, 0.3, 0.3], dtype=torch.float64)
    cache, head = turning_of_cache(2, frequencies), turning_of_head(source)

    def turn_cache(rows):  # rows of a matrix, each turned backwards by its place
        turned = turn_neighbours(rows[:, 2:], -frequencies)
        return torch.cat((rows[:, :2], turned), -1)

    def turn_matrix(turn, width):
        every = torch.eye(width, dtype=torch.float64)[:, None].expand(-1, 9, -1)
        return torch.stack([turn(each) for each in every], -1)

    of_cache = turn_matrix(turn_cache, 8)
    of_head = turn_matrix(lambda rows: turn_halves(rows, -source.inverse_frequencies), 8)
    product = torch.randn(8, 8, dtype=torch.float64)
    mean = MeanProduct(distances, head, cache)
    weights = distances.shares
    expected = torch.einsum("hn,nab,bc,ndc->had", weights, of_head, product, of_cache)
    torch.testing.assert_close(mean.moment(product), expected)
    expected = torch.einsum("hn,nba,bc,ncd->had", weights, of_head, product, of_cache)
    torch.testing.assert_close(mean.form(product), expected)
    expected = torch.einsum("hn,nab,bc->hac", weights, of_cache, product)
    torch.testing.assert_close(distances.mean(product, cache), expected)
