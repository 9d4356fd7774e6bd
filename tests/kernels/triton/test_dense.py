"""Forward and backward of the dense kernels against the reference in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_attn.head_map import HeadMap
from efficient_attn.testing import head_maps
from tests.kernels.triton.oracle import DEVICE, PAIR, Call, compare

SHAPES = [
    ((1, 1), (8, 8)),
    ((3, 17), (40, 64)),
    ((17, 3), (64, 20)),
    ((65, 65), (16, 96)),
    ((33, 130), (80, 16)),
    ((130, 33), (16, 16)),
    ((1, 70), (192, 128)),
    ((5, 9), (256, 200)),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "dims"), SHAPES, ids=str)
def test_shapes(lengths, dims, causal):
    compare(Call.random(lengths=lengths, dims=dims, options={"causal": causal}))


# Lengths that give every kernel tiles that are masked on the left, whole, and masked on the right.
@pytest.mark.parametrize(
    "options",
    [
        {"window": (40, None)},
        {"window": (None, 3)},
        {"window": (5, 70)},
        {"window": (0, 0)},
        {"causal": True, "window": (90, None)},
        {"causal": True, "softcap": 2.0},
        {"scale": 0.0},
        {"scale": -0.3, "causal": True},
    ],
    ids=str,
)
def test_options(options):
    compare(Call.random(lengths=(70, 140), options=options))


@pytest.mark.parametrize("kind", head_maps())
def test_head_maps(kind):
    head_map = head_maps()[kind]
    batch = 2 if head_map.q_to_k is not None and head_map.q_to_k.dim() == 2 else 1
    compare(Call.random(head_map, batch=batch, lengths=(20, 35), options={"causal": True}))


def test_groups_that_nobody_reads_get_zero_gradients(poisoned_memory):
    head_map = HeadMap.from_index([1, 1], [2, 0], num_k_heads=3, num_v_heads=4)
    *_, grad_key, grad_value = compare(Call.random(head_map, lengths=(9, 70)))
    assert not grad_key[:, [0, 2]].any() and not grad_value[:, [1, 3]].any()


def test_a_map_named_twice_is_one_map():
    call = Call.random(HeadMap.from_index([1, 0, 1]), lengths=(20, 35))
    apart = HeadMap.from_index([1, 0, 1], [1, 0, 1]).to(DEVICE)
    apart = Call(call.query, call.key, call.value, apart, call.options)
    torch.testing.assert_close(compare(apart)[0], call.forward()[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"softcap": 3.0, "window": (20, 5)}], ids=str
)
def test_half_precision(dtype, options):
    call = Call.random(lengths=(40, 70), dims=(64, 32), dtype=dtype, options=options)
    out, lse, *grads = compare(call, floor=2e-3)
    assert lse.dtype == torch.float32
    assert {x.dtype for x in (out, *grads)} == {dtype}


def test_without_a_gradient_of_the_log_sum_exp():
    compare(Call.random(lengths=(20, 35)), lse_gradient=False)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_combination(data):
    draw = data.draw
    lengths = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    batch = draw(st.integers(1, 2))
    limit = st.none() | st.integers(0, 80)
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(limit, limit)),
        "softcap": draw(st.sampled_from([0.0, 1.5])),
    }
    if draw(st.booleans()):
        lengths_k = draw(st.lists(st.integers(0, lengths[1]), min_size=batch, max_size=batch))
        options["key_lengths"] = torch.tensor(lengths_k, device=DEVICE)
    if draw(st.booleans()):
        full = (batch, 2, *lengths)
        shape = [size if draw(st.booleans()) else 1 for size in full]
        options["bias"] = torch.randn(shape, device=DEVICE)
    head_map = draw(st.sampled_from([PAIR, HeadMap.from_index([1, 0]), HeadMap.diff(2, k=1, v=2)]))
    dims = draw(st.tuples(st.integers(8, 40), st.integers(8, 40)))
    compare(Call.random(head_map, batch=batch, lengths=lengths, dims=dims, options=options))
