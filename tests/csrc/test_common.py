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


def test_build_facts_name_what_was_built(host):
    facts = host.build_facts()
    assert facts["instruction_set"] in ("baseline", "AVX2", "AVX-512")
    assert facts["torch_target"] == "2.10"
    assert "-O3" in facts["flags"] and facts["compiler"] and isinstance(facts["cuda"], bool)
