"""Attention of a tile and its gradient, on every instruction set, against fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_attn.testing import assert_accurate

any_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@st.composite
def tiles(draw):
    return {
        "rows": draw(st.integers(1, 200)),
        "columns": draw(st.integers(1, 200)),
        "dims": draw(st.sampled_from([(16, 16), (64, 64), (40, 24), (7, 80), (1, 3)])),
        "log_weights": draw(st.booleans()),
        "places": draw(st.booleans()),
        "ranks": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def make(host, rows, columns, dims, log_weights, places, ranks, seed):
    """A tile, the tensors it is made of, and what its scores are added up with: 0 or a weight."""
    torch.manual_seed(seed)
    tensors = torch.randn(rows, dims[0]), torch.randn(60, dims[0]), torch.randn(60, dims[1])
    tokens = torch.randint(60, (columns,))
    tile, bias = host.TileCase(), torch.zeros(rows, columns)
    tile.queries, tile.keys, tile.values = (x.tolist() for x in tensors)
    tile.tokens, tile.scale = tokens.tolist(), 0.3
    if log_weights:
        weights = torch.randn(columns) * 3
        tile.log_weights = weights.tolist()
        bias += weights
    if places:
        place, limit = torch.randint(-2, 9, (columns,)), torch.randint(-4, 12, (rows,))
        tile.places, tile.limits = place.sort().values.tolist(), limit.sort().values.tolist()
        hidden = torch.tensor(tile.places) >= torch.tensor(tile.limits).unsqueeze(-1)
        bias.masked_fill_(hidden, -torch.inf)
    if ranks:
        rank, first = torch.randint(-1, 9, (columns,)), torch.randint(0, 9, (rows, 1))
        last = first + torch.randint(0, 4, (rows, 1))
        tile.ranks = rank.tolist()
        tile.hidden_from, tile.hidden_to = first.flatten().tolist(), last.flatten().tolist()
        bias.masked_fill_((rank >= first) & (rank < last), -torch.inf)
    return tile, tensors, tokens, bias


def attention(query, key, value, bias, scale=0.3):
    score = scale * query @ key.T + bias.to(query.dtype)
    blind = (score == -torch.inf).all(-1, keepdim=True)
    # A row that sees nothing is computed on zeros, which keeps gradients finite, then put right.
    score = score.masked_fill(blind, 0.0)
    lse = score.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)
    return score.softmax(-1).masked_fill(blind, 0.0) @ value, lse


@any_example
@given(case=tiles())
def test_attention(host, case):
    tile, (query, key, value), tokens, bias = make(host, **case)
    plain = attention(query, key[tokens], value[tokens], bias)
    truth = attention(*(x.double() for x in (query, key[tokens], value[tokens])), bias)
    for isa in host.instruction_sets():
        actual = [torch.tensor(x) for x in host.attend_tile(isa, tile)]
        for a, t, p in zip(actual, truth, plain, strict=True):
            assert_accurate(a, t, p)


@any_example
@given(case=tiles())
def test_gradient(host, case):
    tile, (query, key, value), tokens, bias = make(host, **case)
    grad_out, grad_lse = torch.randn(len(query), value.shape[-1]), torch.randn(len(query))

    def gradients(dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (query, key[tokens], value[tokens])]
        out, lse = attention(*inputs, bias)
        seen = lse != -torch.inf
        loss = (out * grad_out.to(dtype)).sum() + (lse * grad_lse.to(dtype))[seen].sum()
        return torch.autograd.grad(loss, inputs), out.detach(), lse.detach()

    (truth, out, lse), (plain, *_) = gradients(torch.float64), gradients(torch.float32)
    delta = (out * grad_out).sum(-1) - grad_lse
    rows = (grad_out.tolist(), lse.tolist(), delta.tolist())
    for isa in host.instruction_sets():
        actual = [torch.tensor(x) for x in host.differentiate_tile(isa, tile, *rows)]
        for a, t, p in zip(actual, truth, plain, strict=True):
            assert_accurate(a, t, p)


@pytest.mark.parametrize("size", [1e4, 1e-30])
def test_scores_of_any_size_stay_finite(host, size):
    tile, tensors, _, _ = make(host, 70, 90, (16, 16), True, False, False, seed=0)
    tile.queries = (tensors[0] * size).tolist()
    for isa in host.instruction_sets():
        for x in host.attend_tile(isa, tile):
            assert torch.tensor(x).isfinite().all()
