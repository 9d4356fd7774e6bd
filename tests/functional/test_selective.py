"""`attention_decode` with selected values: which, how they weigh, what is never read."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import efficient_attn as ea
from efficient_attn import HeadMap, reference
from efficient_attn.ops import native
from efficient_attn.testing import head_maps
from tests.functional.test_decode import LENGTHS, call, paged

MAPS = head_maps(batch=len(LENGTHS))
SIGMA = HeadMap.diff(8, k=1, v=4)
SELECTIONS = [{"top_values": 1}, {"top_values": 5}, {"max_dropped_mass": 0.3}]
WEIGHTS = ["paper", "renormalised", "mean"]


@pytest.fixture(params=["native", "portable"], autouse=True)
def kernels(request):
    """Each test runs with the kernels that answer on this machine, and with the portable ones."""
    if request.param == "portable" and native.status() is None:
        native.use_native().remove()
        yield
        native.use_native()
    else:
        yield


def attend(query, key, value, lengths, **options):
    """Output, log-sum-exp and dropped mass, with the mean of what is cached if it is wanted."""
    options |= {"cache_lengths": lengths, "return_lse": True, "return_dropped_mass": True}
    return ea.attention_decode(query, key, value, **options)


def means(value, lengths):
    rows = [value[b, :, :n].sum(1) / max(n, 1) for b, n in enumerate(lengths.tolist())]
    return torch.stack(rows)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_every_head_map(name, selection, weights, poisoned_memory):
    query, key, value = call(MAPS[name], tokens=3)
    options = {"head_map": MAPS[name], "value_weights": weights, "window": (20, 0), **selection}
    if weights == "mean":
        options["value_mean"] = means(value, LENGTHS)
    expected = reference.selective_decode(query, key, value, cache_lengths=LENGTHS, **options)
    actual = attend(query, key, value, LENGTHS, **options)
    torch.testing.assert_close(actual, expected)
    assert actual[0].transpose(1, 2).is_contiguous()

    # One table serves both caches, so they are put into pages as one.
    joined = torch.cat([x.flatten(1, 1).transpose(1, 2).flatten(2) for x in (key, value)], -1)
    pages, table = paged(joined.unsqueeze(1), LENGTHS)
    widths = [x.shape[1] * x.shape[3] for x in (key, value)]
    pools = [
        x.unflatten(-1, (cache.shape[1], -1)).transpose(1, 2)
        for x, cache in zip(pages.squeeze(1).split(widths, -1), (key, value), strict=True)
    ]
    in_pages = attend(query, *pools, LENGTHS, block_table=table, **options)
    torch.testing.assert_close(in_pages, expected)
    from_reference = reference.selective_decode(
        query, *pools, cache_lengths=LENGTHS, block_table=table, **options
    )
    torch.testing.assert_close(from_reference, expected)


@pytest.mark.parametrize("weights", ["paper", "renormalised"])
@pytest.mark.parametrize("selection", [{"top_values": 32}, {"max_dropped_mass": 0.0}], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_selecting_everything_is_attention(tokens, selection, weights):
    query, key, value = call(SIGMA, tokens=tokens)
    options = {"head_map": SIGMA, "softcap": 1.5, "scale": -0.4}
    out, lse, dropped = attend(
        query, key, value, LENGTHS, **options, **selection, value_weights=weights
    )
    dense = ea.attention_decode(
        query, key, value, cache_lengths=LENGTHS, **options, return_lse=True
    )
    torch.testing.assert_close((out, lse), dense)
    torch.testing.assert_close(dropped, torch.zeros_like(dropped))


def test_one_value_is_that_of_the_largest_weight():
    query, key, value = call(HeadMap.mha(2), torch.tensor([30]))
    weight = torch.softmax(query @ key[:, :, :30].mT / 8**0.5, -1)
    best = value.gather(2, weight.argmax(-1, keepdim=True).expand(-1, -1, -1, 6))
    for weights, factor in (("paper", weight.amax(-1, keepdim=True)), ("renormalised", 1.0)):
        out, _, dropped = attend(
            query, key, value, torch.tensor([30]), top_values=1, value_weights=weights
        )
        torch.testing.assert_close(out, factor * best)
        torch.testing.assert_close(dropped, 1 - weight.amax(-1))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    scores=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.5]), min_size=1, max_size=300),
    top_values=st.integers(1, 310),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_largest_scores_and_of_equal_ones_the_first(scores, top_values, dtype):
    # Values are one-hot, so the output shows the weight of each token.
    count = len(scores)
    key = torch.tensor(scores, dtype=dtype).view(1, 1, -1, 1)
    value = torch.eye(count, dtype=dtype).view(1, 1, count, count)
    query = torch.ones(1, 1, 1, 1, dtype=dtype)
    lengths = torch.tensor([count])
    out = ea.attention_decode(query, key, value, cache_lengths=lengths, top_values=top_values)
    order = sorted(range(count), key=lambda t: (-scores[t], t))[:top_values]
    assert out.flatten().nonzero().flatten().tolist() == sorted(order)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_the_error_is_what_the_dropped_mass_says(data):
    length = data.draw(st.integers(2, 200))
    head_map = MAPS[data.draw(st.sampled_from(sorted(set(MAPS) - {"one row per sample"})))]
    query, key, value = call(head_map, torch.tensor([length]), 2, length)
    lengths, spread = torch.tensor([length]), data.draw(st.sampled_from([0.1, 1.0, 4.0]))
    options = {"head_map": head_map, "scale": spread}
    weight = torch.softmax(reference_scores(query, key, head_map, spread), -1)  # (1, Hq, 2, length)
    exact = ea.attention_decode(query, key, value, cache_lengths=lengths, **options)
    v_of_heads = value.index_select(1, head_map.value_index())
    longest = v_of_heads.norm(dim=-1).amax(-1, keepdim=True)
    mean = value.mean(2)

    masses = []
    for top_values in (1, 2, 7, 50):
        selected = weight >= weight.topk(min(top_values, length)).values[..., -1:]
        kept = weight * selected
        tau = 1 - kept.sum(-1)
        head = torch.einsum("bhij,bhjd->bhid", kept, v_of_heads)
        center = mean.index_select(1, head_map.value_index()).unsqueeze(2)
        for weights, expected in (
            ("paper", head),
            ("renormalised", head / kept.sum(-1, keepdim=True)),
            ("mean", head + tau.unsqueeze(-1) * center),
        ):
            given = {"value_mean": mean} if weights == "mean" else {}
            out, _, dropped = attend(
                query, key, value, lengths, **options, top_values=top_values,
                value_weights=weights, **given,
            )  # fmt: skip
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(dropped, tau, rtol=0, atol=1e-10)
            error = (out - exact).norm(dim=-1)
            bound = dropped * (longest if weights == "paper" else 2 * longest)
            assert (error <= bound + 1e-9).all()
        masses.append(dropped)
    assert all((a >= b - 1e-12).all() for a, b in zip(masses, masses[1:], strict=False))


def reference_scores(query, key, head_map, scale):
    """Scores of the last two tokens, the last key hidden from the first of them."""
    keys = key.index_select(1, head_map.key_index())
    scores = scale * query @ keys.mT
    hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(scores.shape[-1] - 1)
    return scores.masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.2, 0.9])
def test_the_fewest_values_that_a_mass_allows(eps):
    lengths = torch.tensor([300])
    query, key, value = call(HeadMap.mha(3), lengths, room=300)
    options = {"scale": 2.0}
    _, _, dropped = attend(query, key, value, lengths, **options, max_dropped_mass=eps)
    weight = torch.softmax(2.0 * query @ key.mT, -1).sort(descending=True).values
    before = weight.cumsum(-1) - weight
    expected = weight.masked_fill(before < 1 - eps, 0.0).sum(-1)
    torch.testing.assert_close(dropped, expected, rtol=0, atol=1e-10)
    assert (dropped <= eps + 1e-10).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_values_that_are_not_selected_are_not_read(selection, dtype, poisoned_memory):
    head_map = HeadMap.gqa(4, 2)
    lengths = torch.tensor([150, 0, 20])
    query, key, value = call(head_map, lengths, room=160, dtype=dtype)
    expected = attend(query, key, value, lengths, head_map=head_map, **selection)
    one_hot = torch.eye(160).to(dtype).expand(3, 2, -1, -1)
    weights = ea.attention_decode(
        query, key, one_hot, cache_lengths=lengths, head_map=head_map, **selection
    )
    unread = weights.unflatten(1, (2, 2)).abs().sum(dim=(2, 3)) == 0
    value = value.masked_fill(unread.unsqueeze(-1), torch.nan)
    actual = attend(query, key, value, lengths, head_map=head_map, **selection)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_cached_nan_is_not_hidden():
    for selection in SELECTIONS:
        query, key, value = call(HeadMap.mha(2), torch.tensor([20, 20]), dtype=torch.float32)
        key[0, 1, 4, 3] = torch.nan
        out, lse, _ = attend(query, key, value, torch.tensor([20, 20]), **selection)
        assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
        assert out[1].isfinite().all() and out[0, 0].isfinite().all()


def test_no_sequences_and_no_room():
    for lengths, room in ((torch.zeros(0, dtype=torch.int64), 32), (torch.tensor([0]), 0)):
        query, key, value = call(HeadMap.gqa(4, 2), lengths, room=room)
        for selection in SELECTIONS:
            out, lse, dropped = attend(query, key, value, lengths, **selection)
            assert out.shape == (len(lengths), 4, 1, 6) and not out.any() and not dropped.any()
            assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"top_values": 0}, ValueError, "top_values is 0; pass at least 1"),
        ({"top_values": -3}, ValueError, "top_values is -3; pass at least 1"),
        ({"top_values": 2.0}, TypeError, "pass a whole number"),
        ({"max_dropped_mass": 1.0}, ValueError, r"is 1.0; it must lie in \[0, 1\)"),
        ({"max_dropped_mass": -0.1}, ValueError, r"is -0.1; it must lie in \[0, 1\)"),
        ({"max_dropped_mass": float("nan")}, ValueError, r"is nan; it must lie in \[0, 1\)"),
        ({"top_values": 3, "max_dropped_mass": 0.1}, ValueError, "pass one of them"),
        ({"top_values": 3, "value_weights": "renorm"}, ValueError, "'paper', 'renormalised' or"),
        ({"top_values": 3, "value_weights": "mean"}, ValueError, "value_mean is missing"),
        ({"top_values": 3, "value_mean": torch.zeros(2, 4, 8)}, ValueError, "is given"),
        (
            {"top_values": 3, "value_weights": "mean", "value_mean": torch.zeros(2, 8)},
            ValueError,
            r"it must be \(batch, value heads, value dim\) = \(2, 4, 8\)",
        ),
        ({"return_dropped_mass": True}, ValueError, "pass top_values or max_dropped_mass too"),
        ({"value_weights": "renormalised"}, ValueError, "pass top_values or max_dropped_mass too"),
    ],
    ids=str,
)
def test_what_is_refused(options, kind, message):
    query, key, value = (torch.randn(2, 4, n, 8) for n in (1, 8, 8))
    with pytest.raises(kind, match=message):
        ea.attention_decode(query, key, value, cache_lengths=torch.tensor([3, 4]), **options)


def test_has_no_gradient():
    query, key, value = call(HeadMap.mha(2), torch.tensor([3]))
    options = {"cache_lengths": torch.tensor([3]), "top_values": 2}
    out = ea.attention_decode(query.requires_grad_(), key, value, **options)
    with pytest.raises(ea.UnsupportedError, match="gradient of attention to a cache"):
        out.sum().backward()
