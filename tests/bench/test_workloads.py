import itertools

import pytest
import torch

from bench.suites import SUITES, select
from bench.workloads import length_label
from tests.bench.toys import (
    ALL,
    CACHED,
    DIFF,
    EMPTY_GROUP,
    LATENT,
    PERMUTED,
    RECTANGLE,
    SEVERAL,
    UNEVEN,
    WINDOW,
)

EVERY = [workload for suite in SUITES.values() for workload in suite]


def test_names_are_unique_and_say_where_they_belong():
    names = [workload.name for workload in EVERY]
    assert len(set(names)) == len(names)
    for workload in EVERY:
        assert workload.name.startswith(workload.suite)
        assert workload.name.endswith(length_label(workload.num_keys))


@pytest.mark.parametrize("workload", EVERY, ids=lambda workload: workload.name)
def test_head_maps_are_whole(workload):
    for index, heads in (
        (workload.key_index(), workload.k_heads),
        (workload.value_index(), workload.v_heads),
    ):
        assert len(index) == workload.q_heads
        # A cache may hold heads that nobody reads any more.
        assert set(index) == set(range(heads)) or (
            workload.reads_a_cache and set(index) < set(range(heads))
        )


def test_each_suite_has_a_quick_part_and_both_devices():
    for suite in SUITES:
        for device in ("cpu", "cuda"):
            assert select(device=device, suites=[suite])
        assert select(device="cpu", suites=[suite], quick=True)
    assert not select(device="cuda", quick=True)


def test_unknown_suite_is_named():
    with pytest.raises(ValueError, match="unknown suites"):
        select(suites=["nosuch"])


@pytest.mark.parametrize("workload", ALL + CACHED, ids=lambda workload: workload.name)
def test_visible_scores_are_the_mask_counted(workload):
    rows = torch.arange(workload.num_queries)
    mask = workload.visible_keys(rows)
    assert workload.visible_scores() == int(mask.sum())
    for i, j in itertools.product(range(workload.num_queries), range(workload.num_keys)):
        diagonal = i + workload.num_keys - workload.num_queries
        expected = not workload.causal or j <= diagonal
        if workload.window is not None:
            expected = expected and j >= diagonal - workload.window[0]
        assert bool(mask[i, j]) == expected


def test_costs_by_hand():
    scores = 33 * 34 // 2
    forward = 2 * 4 * scores * 2 * (4 + 8)
    backward = 2 * 4 * scores * 2 * (3 * 4 + 2 * 8)
    assert DIFF.flops() == forward + backward
    elements = 2 * 33 * (4 * 4 + 1 * 4 + 2 * 8 + 4 * 8)
    assert DIFF.minimal_bytes() == 3 * elements * 4
    assert DIFF.result_bytes() == (elements + 2 * 33 * 4 * 8) * 4 - 2 * 33 * 4 * 8 * 4
    assert DIFF.expanded_key_bytes() == 2 * 4 * 33 * 4 * 4
    assert WINDOW.visible_scores() == sum(min(i, 5) + 1 for i in range(33))
    assert RECTANGLE.visible_scores() == sum(range(25, 34))


def test_of_a_cache_only_what_is_read_counts():
    assert SEVERAL.minimal_bytes() == SEVERAL.cache_bytes() == 2 * 33 * (2 * 8 + 2 * 8) * 4
    assert EMPTY_GROUP.cache_bytes() == SEVERAL.cache_bytes(), "one of three heads is not read"
    assert LATENT.cache_bytes() == 2 * 33 * 12 * 4, "the value is a part of the row"


def test_the_latent_is_stored_once():
    inputs = LATENT.make_inputs("cpu")
    assert inputs.value.data_ptr() == inputs.key.data_ptr() and inputs.value.shape[-1] == 8


def test_inputs_are_repeatable_and_laid_out_as_asked():
    first, second = UNEVEN.make_inputs("cpu"), UNEVEN.make_inputs("cpu")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad and one.is_leaf
        assert one.transpose(1, 2).is_contiguous()
    assert first.key.shape == (2, 2, 33, 8)


def test_only_uneven_maps_are_passed_on():
    assert DIFF.head_map("cpu") is None
    assert PERMUTED.head_map("cpu").q_to_v.tolist() == [0, 1, 1, 0]
