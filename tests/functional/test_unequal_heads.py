"""Separate numbers and widths of key and value heads: which head is read, and what follows."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import efficient_attn as ea
from efficient_attn import HeadMap, reference
from efficient_attn.testing import assert_accurate

# Query, key and value heads: nested both ways, not nested, and one head for all.
TRIPLES = [
    (32, 4, 16), (32, 16, 4), (24, 4, 6), (12, 4, 6), (6, 3, 2), (8, 1, 8), (8, 8, 1), (8, 8, 8),
    (8, 2, 2), (8, 1, 1),
]  # fmt: skip
WIDTHS = [*itertools.product((16, 32, 40, 64, 96, 128), (32, 64, 96, 128, 256))]


def call(heads, tokens=(7, 9), dims=(8, 6), dtype=torch.float64, requires_grad=False):
    queries, keys, values = heads
    shapes = (
        (2, queries, tokens[0], dims[0]),
        (2, keys, tokens[1], dims[0]),
        (2, values, tokens[1], dims[1]),
    )
    return [torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes]


def reads(count, heads):
    """The head that each query head reads, equation 3 of the paper."""
    return torch.tensor([i * count // heads for i in range(heads)])


def written_out(query, key, value, visible, softcap=0.0):
    """The formula with a key and a value head for every query head."""
    heads = query.shape[1]
    key, value = (x.index_select(1, reads(x.shape[1], heads)) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


def visible_keys(queries, keys, left=None):
    behind = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
    return (behind >= 0) & (behind <= (keys if left is None else left))


@pytest.mark.parametrize("options", [{}, {"window": (3, 0), "softcap": 1.5}], ids=str)
@pytest.mark.parametrize("heads", TRIPLES, ids=str)
def test_outputs_and_gradients_are_those_of_heads_written_out(heads, options, poisoned_memory):
    """The gradient of a shared head is then the sum over the query heads that read it."""
    inputs = call(heads, requires_grad=True)
    head_map = HeadMap.diff(heads[0], k=heads[1], v=heads[2])
    out = ea.attention(*inputs, causal=True, head_map=head_map, **options)
    visible = visible_keys(7, 9, options.get("window", (None,))[0])
    expected = written_out(*inputs, visible, options.get("softcap", 0.0))
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out)
    )


@pytest.mark.parametrize("heads", [h for h in TRIPLES if h[1] == h[2]], ids=str)
def test_equal_numbers_are_grouped_attention_of_torch(heads):
    inputs = call(heads, tokens=(9, 9), requires_grad=True)
    out = ea.attention(*inputs, causal=True)
    expected = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    )


@pytest.mark.parametrize("heads", TRIPLES, ids=str)
def test_values_that_hold_their_heads_number_show_who_reads_them(heads):
    queries, keys, values = heads
    query, key, value = call(heads, tokens=(1, 9))
    value = torch.arange(values).double().view(1, -1, 1, 1).expand_as(value)
    lengths = torch.tensor([9, 4])
    for out in (
        ea.attention(query, key, value),
        ea.attention_decode(query, key, value, cache_lengths=lengths),
    ):
        shown = reads(values, queries).double().view(1, -1, 1, 1).expand_as(out)
        torch.testing.assert_close(out, shown, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", TRIPLES, ids=str)
def test_keys_that_point_at_one_token_show_who_reads_them(heads):
    """Every query has all the weight on the token that its key head points at."""
    queries, keys, values = heads
    query = torch.full((1, queries, 1, 1), 1e3).double()
    token = torch.arange(keys)
    key = torch.zeros(1, keys, keys, 1).double()
    key[0, token, token] = 1.0
    value = torch.arange(keys).double().view(1, 1, -1, 1).expand(1, values, -1, -1)
    for out in (
        ea.attention(query, key, value),
        ea.attention_decode(query, key, value, cache_lengths=torch.tensor([keys])),
    ):
        assert torch.equal(out.flatten(), reads(keys, queries).double())


@pytest.mark.parametrize("heads", [(32, 4, 16), (8, 1, 8), (12, 2, 6)], ids=str)
def test_a_call_for_each_value_head_of_a_key_head_gives_the_same(heads):
    """Grouped attention on every ``r``-th value head and the queries that read it."""
    queries, keys, values = heads
    query, key, value = call(heads)
    ratio, share = values // keys, queries // values
    by_slot = query.unflatten(1, (keys, ratio, share))
    parts = [
        ea.attention(by_slot[:, :, slot].flatten(1, 2), key, value[:, slot::ratio])
        for slot in range(ratio)
    ]
    joined = torch.stack([part.unflatten(1, (keys, share)) for part in parts], 2).flatten(1, 3)
    torch.testing.assert_close(joined, ea.attention(query, key, value))


@pytest.mark.parametrize("heads", [(24, 4, 6), (12, 4, 6), (32, 4, 16)], ids=str)
def test_heads_may_be_permuted_and_keys_scaled(heads):
    queries, keys, values = heads
    query, key, value = call(heads)
    out = ea.attention(query, key, value)
    # Whatever reads one joined head moves with it.
    groups = torch.gcd(torch.tensor(keys), torch.tensor(values)).item()
    order = torch.randperm(groups)
    moved = [x.unflatten(1, (groups, -1))[:, order].flatten(1, 2) for x in (query, key, value, out)]
    torch.testing.assert_close(ea.attention(*moved[:3]), moved[3])
    scaled = ea.attention(query, 4 * key, value, scale=query.shape[-1] ** -0.5 / 4)
    torch.testing.assert_close(scaled, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", WIDTHS, ids=str)
def test_any_two_widths_and_nothing_beside_them(dims, dtype, poisoned_memory):
    """Around every row lie numbers that are none; a value too many that is read is seen."""
    heads, lengths = (6, 1, 3), torch.tensor([70, 3])
    query, key, value = (x.to(dtype) for x in call(heads, (2, 70), dims))

    def fenced(x):
        room = torch.full((2, x.shape[2] + 2, x.shape[1], x.shape[3] + 2), torch.nan, dtype=dtype)
        view = room[:, 1:-1, :, 1:-1].transpose(1, 2)
        view.copy_(x)
        return view

    given = [fenced(x) for x in (query, key, value)]
    outs = {
        "decode": ea.attention_decode(*given, cache_lengths=lengths),
        "prefill": ea.attention(*given, key_lengths=lengths, causal=False),
    }
    for name, out in outs.items():
        results = []
        for cast in (torch.Tensor.double, lambda x: x):
            inputs = [cast(x) for x in (query, key, value)]
            if name == "decode":
                results.append(reference.attention_decode(*inputs, cache_lengths=lengths)[0])
            else:
                results.append(reference.attention(*inputs, key_lengths=lengths)[0])
        assert_accurate(out, *results, floor=1e-6 if dtype == torch.float32 else 1e-3)
