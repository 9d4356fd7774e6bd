"""The tensor-free native code against Python, through the doors of `efficient_attn._host`."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_attn.head_map import head_groups

any_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
score = st.floats(-60, 60) | st.just(-math.inf)


@any_example
@given(data=st.data(), num_heads=st.integers(1, 12))
def test_head_groups_are_those_of_the_head_map(host, data, num_heads):
    index = data.draw(st.lists(st.integers(0, num_heads - 1), max_size=40))
    starts, members = host.head_groups(index, num_heads)
    expected = head_groups(torch.tensor(index, dtype=torch.int32), num_heads)
    assert starts == expected.starts.tolist() and members == expected.members.tolist()


@pytest.mark.parametrize("wrong", [-1, 3])
def test_head_groups_refuse_a_head_that_is_not_there(host, wrong):
    with pytest.raises(ValueError, match=f"index holds {wrong}"):
        host.head_groups([0, wrong], 3)


@any_example
@given(lses=st.lists(score, min_size=1, max_size=9))
def test_merge_weights_are_a_softmax_of_the_lses(host, lses):
    weights, lse = host.merge_weights(lses)
    truth = torch.tensor(lses, dtype=torch.float64)
    assert lse == pytest.approx(truth.logsumexp(0).item(), rel=1e-12, abs=1e-12)
    expected = truth.softmax(0).nan_to_num(0)  # No part saw anything: no part weighs anything.
    torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), expected)


def state_of(scores):
    """The softmax state (max, sum) of some scores, by definition."""
    top = max(scores, default=-math.inf)
    return top, sum(math.exp(x - top) for x in scores if x > -math.inf)


@any_example
@given(left=st.lists(score, max_size=6), right=st.lists(score, max_size=6))
def test_merging_states_is_seeing_both(host, left, right):
    merged = host.merge_softmax(state_of(left), state_of(right))
    assert merged == pytest.approx(state_of(left + right), rel=1e-12)
    assert merged == host.merge_softmax(state_of(right), state_of(left))
    expected = torch.tensor([*left, *right, -math.inf], dtype=torch.float64).logsumexp(0).item()
    assert host.log_sum_exp(merged) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_every_instruction_set_merges_the_same_row(host):
    # Lengths around the lanes of each and their blocks of eight.
    for length in (1, 3, 4, 5, 8, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300):
        parts, lses = torch.randn(3, length), torch.randn(3)
        weights = lses.double().softmax(0)
        expected = (weights[:, None] * parts.double()).sum(0)
        for isa in host.instruction_sets():
            out, lse = host.merge_row(isa, parts.tolist(), lses.tolist())
            actual = torch.tensor(out, dtype=torch.float64)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, msg=isa)
            assert lse == pytest.approx(lses.logsumexp(0).item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_instruction_set_rounds_as_torch_does(host, dtype):
    narrow = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    # Every 16-bit number, what lies halfway to its neighbour, and just beside that.
    halfway = ((narrow.double() + narrow.double().roll(1)) / 2).float()
    beside = [halfway.nextafter(torch.tensor(x)) for x in (-torch.inf, torch.inf)]
    edges = torch.tensor([65504.0, 65519.99, 65520.0, 1e-40, 3.4e38, 2.0**-25, 2.0**-24 * 1.5])
    values = torch.cat([narrow, halfway, *beside, edges, -edges])
    expected = values.to(dtype).float()
    for isa in host.instruction_sets():
        actual = torch.tensor(
            host.round_trip(isa, str(dtype).removeprefix("torch."), values.tolist())
        )
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(nan=0), expected.nan_to_num(nan=0)), isa
        assert torch.equal(actual.signbit() | actual.isnan(), expected.signbit() | expected.isnan())


def test_an_instruction_set_that_is_not_there_is_refused(host):
    with pytest.raises(ValueError, match="does not run AVX-9"):
        host.merge_row("AVX-9", [[1.0]], [0.0])


def test_build_facts_name_what_was_built(host):
    facts = host.build_facts()
    assert facts["instruction_set"] == host.instruction_sets()[-1]
    assert facts["torch_target"] == "2.10"
    assert "-O3" in facts["flags"] and facts["compiler"] and isinstance(facts["cuda"], bool)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    drawn=st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 5)), max_size=60),
    enough=st.integers(1, 200),
    ordered=st.sampled_from([0, 1, -1]),
)
def test_the_fewest_best_that_weigh_enough(host, drawn, enough, ordered):
    # Whole numbers add up exactly, and many scores are equal: then the first token is better.
    drawn = sorted(drawn, reverse=ordered < 0) if ordered else drawn
    scores, weights = ([float(x[i]) for x in drawn] for i in range(2))
    expected, total = [], 0.0
    for token in sorted(range(len(drawn)), key=lambda t: (-scores[t], t)):
        if total >= enough:
            break
        expected.append(token)
        total += weights[token]
    assert sorted(host.select_best(scores, weights, enough)) == sorted(expected)
