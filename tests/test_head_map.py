"""HeadMap: constructors, refusals, and an inverse that really is one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efficient_attn import HeadMap
from efficient_attn.head_map import head_groups


@st.composite
def indices(draw):
    num_heads = draw(st.integers(1, 9))
    rows = draw(st.integers(0, 3))
    length = draw(st.integers(1, 17))
    row = st.lists(st.integers(0, num_heads - 1), min_size=length, max_size=length)
    values = draw(row) if rows == 0 else [draw(row) for _ in range(rows)]
    return torch.tensor(values, dtype=torch.int32), num_heads


@given(indices())
def test_the_inverse_lists_exactly_the_readers_of_each_head(case):
    index, num_heads = case
    groups = head_groups(index, num_heads)
    rows = zip(
        index.reshape(-1, index.shape[-1]).tolist(),
        groups.starts.reshape(-1, num_heads + 1).tolist(),
        groups.members.reshape(-1, index.shape[-1]).tolist(),
        strict=True,
    )
    for reads, starts, members in rows:
        for head in range(num_heads):
            readers = [h for h, read in enumerate(reads) if read == head]
            assert members[starts[head] : starts[head + 1]] == readers
    assert groups.starts.dtype == groups.members.dtype == torch.int32


def test_constructors_name_the_heads_that_their_methods_mean():
    assert HeadMap.mha(3).key_index().tolist() == [0, 1, 2]
    assert HeadMap.mqa(3).key_index().tolist() == [0, 0, 0]
    assert HeadMap.gqa(6, 2).value_index().tolist() == [0, 0, 0, 1, 1, 1]
    diff = HeadMap.diff(8, k=2, v=4)
    assert diff.key_index().tolist() == [0] * 4 + [1] * 4
    assert diff.value_index().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert HeadMap.from_group_sizes([2, 0, 3]).key_index().tolist() == [0, 0, 2, 2, 2]


def test_even_maps_carry_no_index():
    for even in (HeadMap.mha(4), HeadMap.mqa(4), HeadMap.gqa(4, 2), HeadMap.diff(4, k=1, v=2)):
        assert even.q_to_k is None and even.q_to_v is None


def test_group_sizes_with_one_row_per_sample():
    head_map = HeadMap.from_group_sizes(torch.tensor([[1, 2, 1], [4, 0, 0]]))
    assert head_map.key_index().tolist() == [[0, 1, 1, 2], [0, 0, 0, 0]]
    assert head_map.num_q_heads == 4 and head_map.num_k_heads == 3


def test_values_follow_keys_unless_given():
    head_map = HeadMap.from_index([1, 0, 1], num_k_heads=3)
    assert head_map.q_to_v.tolist() == [1, 0, 1] and head_map.num_v_heads == 3
    head_map = HeadMap.from_index([1, 0, 1], [0, 4, 0])
    assert (head_map.num_k_heads, head_map.num_v_heads) == (2, 5)


def test_a_map_moves_between_devices():
    moved = HeadMap.from_group_sizes([1, 2]).to("meta")
    assert moved.q_to_k.device.type == moved.q_to_v.device.type == "meta"
    assert HeadMap.gqa(4, 2).to("meta") == HeadMap.gqa(4, 2)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: HeadMap.gqa(8, 3), ValueError, "do not divide 8 query heads"),
        (lambda: HeadMap.mha(0), ValueError, "at least 1"),
        (lambda: HeadMap.from_group_sizes([3, -1]), ValueError, "non-negative"),
        (lambda: HeadMap.from_group_sizes([3.0, 1.0]), ValueError, "pass integers"),
        (lambda: HeadMap.from_group_sizes([3, 1], num_q_heads=5), ValueError, "sum to"),
        (
            lambda: HeadMap.from_group_sizes(torch.tensor([[3, 1], [1, 1]])),
            ValueError,
            "each row must sum",
        ),
        (lambda: HeadMap.from_index([0, 3], num_k_heads=3), ValueError, r"lie in \[0, 2\]"),
        (lambda: HeadMap.from_index([0, -1], num_k_heads=3), ValueError, "ranges from -1"),
        (lambda: HeadMap.from_index([0.5, 1.0], num_k_heads=2), TypeError, "pass integers"),
        (lambda: HeadMap.from_index([0, 1], [0, 1, 1]), ValueError, "q_to_v has shape"),
        (lambda: HeadMap.from_index(torch.zeros(1, 1, 2).int()), ValueError, "shape"),
        (
            lambda: HeadMap.from_index(torch.zeros(2, dtype=torch.int32, device="meta")),
            ValueError,
            "pass num_k_heads",
        ),
    ],
)
def test_what_is_refused_and_why(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_one_map_stays_one_tensor_wherever_it_goes():
    for head_map in (HeadMap.from_index([1, 0, 1]), HeadMap.from_group_sizes([2, 1])):
        moved = head_map.to("meta")
        assert head_map.q_to_v is head_map.q_to_k and moved.q_to_v is moved.q_to_k
    apart = HeadMap.from_index([1, 0], [0, 1]).to("meta")
    assert apart.q_to_v is not apart.q_to_k
