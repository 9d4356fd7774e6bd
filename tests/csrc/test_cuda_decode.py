"""attention_decode in CUDA, on an emulated machine and, where there is one, on a device."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_attn.head_map import HeadMap
from efficient_attn.ops import cuda
from efficient_attn.testing import head_maps
from tests.cached_inputs import LENGTHS, cached, in_pages
from tests.csrc.cuda_machines import Machine, compare

MAPS = head_maps(batch=len(LENGTHS))
GROUPS = HeadMap.from_group_sizes([0, 3, 1])
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("name", MAPS)
def test_head_maps(machine, name, poisoned_memory):
    inputs = cached(MAPS[name], dims=(64, 64), dtype=FP16)
    out, _ = compare(machine, *inputs, LENGTHS, MAPS[name])
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("head_map", "tokens"),
    [
        (HeadMap.mqa(40), 1),  # three tiles, the last one not full
        (HeadMap.from_group_sizes([20, 0, 17, 3]), 1),
        (HeadMap.from_index([0, 1] * 9, [0, 0, 1] * 6), 1),  # tiles of one key head, several values
        (HeadMap.diff(32, k=2, v=32), 1),  # as many value heads as rows
        (HeadMap.from_index([3, 40, 3, 39], num_k_heads=41), 2),  # more key heads than lanes
        (HeadMap.gqa(6, 2), 16),
        (GROUPS, 5),
    ],
    ids=["many heads", "uneven", "two maps", "many values", "many keys", "tokens", "uneven tokens"],
)
def test_tiles(machine, head_map, tokens, poisoned_memory):
    lengths = (37, 9)  # Of 9 keys, the first of 16 tokens see none.
    inputs = cached(head_map, lengths, tokens, (64, 64), 40, BF16)
    compare(machine, *inputs, lengths, head_map)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
def test_head_dims(machine, dims, dtype, poisoned_memory):
    inputs = cached(GROUPS, (70, 150), 2, dims, 150, dtype)
    compare(machine, *inputs, (70, 150), GROUPS)


@pytest.mark.parametrize("page_size", [1, 16, 24, 64])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_pages(machine, page_size, integers, poisoned_memory):
    query, *caches = cached(GROUPS, LENGTHS, 1, (64, 128), dtype=BF16)
    table, *pools = in_pages(LENGTHS, page_size, *caches)
    compare(machine, query, *pools, LENGTHS, GROUPS, table.to(integers), caches)


@pytest.mark.parametrize("layout", ["heads", "broadcast", "one pool"])
def test_any_strides_of_whole_granules(machine, layout):
    query, key, value = cached(GROUPS, (70, 70), dims=(64, 64), dtype=BF16)
    if layout == "heads":
        query, key, value = (x.contiguous() for x in (query, key, value))
    elif layout == "broadcast":
        query, key, value = (x[:1].expand_as(x) for x in (query, key, value))
    else:
        key, value = torch.cat([key, value], -1).split([64, 64], -1)
    compare(machine, query, key, value, (70, 70), GROUPS)


def test_heads_that_nobody_reads_are_not_read(machine):
    query, key, value = cached(GROUPS, dims=(64, 64), dtype=BF16)
    key[:, 0] = value[:, 0] = torch.nan
    compare(machine, query, key, value, LENGTHS, GROUPS)


def test_lengths_beyond_the_cache_read_what_there_is(machine):
    inputs = cached(GROUPS, (70, 70), dims=(64, 64), room=70, dtype=BF16)
    expected = machine.attention_decode(*inputs, (70, 0), GROUPS)
    actual = machine.attention_decode(*inputs, (900, -3), GROUPS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "tokens", "room"), [(0, 1, 4), (2, 0, 4), (2, 1, 0)])
def test_sizes_of_zero(machine, batch, tokens, room, poisoned_memory):
    inputs = cached(GROUPS, [0] * batch, tokens, (64, 64), room, BF16)
    out, lse = machine.attention_decode(*inputs, [0] * batch, GROUPS)
    assert out.shape == (batch, 4, tokens, 64) and not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 40.0])
def test_scales(machine, scale):
    query, key, value = cached(HeadMap.mha(2), (70,), dims=(64, 64), dtype=BF16)
    out, lse = machine.attention_decode(query, key, value, (70,), scale=scale)
    scores = scale * (query.double() @ key[:, :, :70].double().transpose(-1, -2))
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    expected = scores.softmax(-1) @ value[:, :, :70].double()
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_parts_are_merged_in_one_order_whoever_comes_last(emulated, poisoned_memory):
    # Fourteen splits, which are merged in two groups, then these; five; one; and none.
    lengths = (1700, 600, 100, 0)
    head_map = HeadMap.gqa(2, 1)
    inputs = cached(head_map, lengths, 1, (64, 64), 1700, FP16)
    first = compare(Machine(blocks=100), *inputs, lengths, head_map)
    again = Machine(blocks=100, seed=7).attention_decode(*inputs, lengths, head_map)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    fewer = Machine(blocks=20).attention_decode(*inputs, lengths, head_map)
    torch.testing.assert_close(fewer, first, rtol=2e-3, atol=2e-3)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=2),
    tokens=st.integers(1, 4),
    page_size=st.sampled_from([None, 7, 32]),
    seed=st.integers(0, 2**16),
)
def test_anything_that_is_covered(emulated, pairs, lengths, tokens, page_size, seed):
    torch.manual_seed(seed)
    head_map = HeadMap.from_index(
        [k for k, _ in pairs], [v for _, v in pairs], num_k_heads=4, num_v_heads=4
    )
    query, *caches = cached(head_map, lengths, tokens, (64, 64), 210, BF16)
    table, pools = None, caches
    if page_size is not None:
        table, *pools = in_pages(lengths, page_size, *caches)
    compare(Machine(seed=seed), query, *pools, lengths, head_map, table, caches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "pass bfloat16 or float16"),
        (lambda q, k, v: (q, k, v[..., :32]), "head dims 64 and 32"),
        (lambda q, k, v: (q, k[..., ::2].repeat(1, 1, 1, 2)[..., 1:], v), "fit together"),
        (lambda q, k, v: (q, torch.stack([k, k], -1)[..., 0], v), "multiples of 16 bytes"),
        (lambda q, k, v: (torch.stack([q, q], -1)[..., 0], k, v), "multiples of 4 bytes"),
        (lambda q, k, v: (q, k, v[:, :2]), "even groups"),
    ],
)
def test_what_is_not_covered_is_refused_with_a_reason(emulated, change, message):
    inputs = change(*cached(HeadMap.mha(3), (5,), dims=(64, 64), dtype=BF16))
    with pytest.raises(RuntimeError, match=message):
        Machine().attention_decode(*inputs, (5,))


@pytest.mark.parametrize("name", ["attention_decode", "mla_decode"])
def test_what_a_device_is_checked_with(emulated, name):
    """The kernel covers it and agrees, so that only a wrong kernel is refused."""
    candidate = next(x for x in cuda.CANDIDATES if x.name == name)
    arguments = candidate.sample(torch.device("cpu"))
    assert candidate.covers(*arguments)
    actual = getattr(torch.ops.efficient_attn_emulated, name)(*arguments, 132, 0)
    expected = getattr(torch.ops.efficient_attn, name)(*arguments)
    assert all(map(candidate.agrees, actual, expected))
    for axis in (0, 1):
        wrong = [x.roll(1, axis) for x in expected]
        assert not any(map(candidate.agrees, wrong, expected))


@pytest.mark.gpu
def test_a_graph_follows_lengths_and_map_and_begins_anew():
    head_map = GROUPS.to("cuda")
    inputs = [x.cuda() for x in cached(GROUPS, (4000, 4000), 1, (64, 64), 4000, BF16)]
    lengths = torch.tensor([17, 4000], device="cuda", dtype=torch.int32)

    def call():
        return torch.ops.efficient_attn_native.attention_decode(
            *inputs, lengths, None, head_map.q_to_k, head_map.q_to_v, None, 0.125, 0.0
        )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = call()
    for new_lengths, new_map in (([4000, 1], [2, 1, 1, 0]), ([0, 2500], [0, 0, 0, 0])):
        lengths.copy_(torch.tensor(new_lengths))
        head_map.q_to_k.copy_(torch.tensor(new_map))
        for _ in range(3):
            graph.replay()
            torch.testing.assert_close(outs, call(), rtol=0, atol=0)


@pytest.mark.gpu
def test_streams_do_not_disturb_each_other():
    lengths = torch.full((2,), 4000, device="cuda", dtype=torch.int32)
    inputs = [x.cuda() for x in cached(HeadMap.mha(4), (4000, 4000), 1, (128, 128), 4000, BF16)]

    def call():
        return torch.ops.efficient_attn_native.attention_decode(
            *inputs, lengths, None, None, None, None, 0.1, 0.0
        )

    expected = call()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(call())
    torch.cuda.synchronize()
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
