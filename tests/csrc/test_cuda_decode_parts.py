"""What the CUDA kernels of attention to a cache are made of, through the doors of `_host`."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

any_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.mark.parametrize(
    ("name", "operand", "shape", "per_register"),
    [("left", 0, (16, 16), 2), ("right", 1, (16, 8), 2), ("product", None, (16, 8), 1)],
)
def test_lanes_hold_what_triton_says_they_hold(host, name, operand, shape, per_register):
    gluon = pytest.importorskip("triton.experimental.gluon.language")
    layout = gluon.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    if operand is not None:
        layout = gluon.DotOperandLayout(operand_index=operand, parent=layout, k_width=2)
    view = re.findall(r"T(\d+):(\d+)", layout.format_tensor_view(list(shape)))
    assert len(view) == shape[0] * shape[1]
    fragment = host.fragment(name)
    for i, (lane, element) in enumerate(view):
        register, second = divmod(int(element), per_register)
        row, column = fragment[int(lane)][register]
        # The two numbers of a register follow each other along the sum.
        expected = (row + second, column) if name == "right" else (row, column + second)
        assert divmod(i, shape[1]) == expected


def loaded(host, name, stored, transposed):
    """What ldmatrix leaves in the registers of each lane: pairs of numbers of `stored`."""
    places = host.load_places(name)
    lanes = []
    for lane in range(32):
        registers = []
        for matrix in range(4):
            rows = places[8 * matrix : 8 * matrix + 8]

            def number(row, column, rows=rows):
                return stored[rows[row][0]][8 * rows[row][1] + column]

            a, b = divmod(lane, 4)
            pair = [number(2 * b + i, a) if transposed else number(a, 2 * b + i) for i in (0, 1)]
            registers.append(tuple(pair))
        lanes.append(registers)
    return lanes


def test_loads_give_each_lane_its_fragment(host):
    stored = [[(row, column) for column in range(32)] for row in range(16)]
    left = loaded(host, "left", stored, transposed=False)
    # Values are stored row by row, keys by row too, but it is their columns that are summed over.
    values = loaded(host, "left", stored, transposed=True)
    keys = loaded(host, "right", stored, transposed=False)
    deep = loaded(host, "deep right", stored, transposed=False)
    for lane in range(32):
        places = host.fragment("left")[lane]
        assert left[lane] == [((r, c), (r, c + 1)) for r, c in places]
        right = host.fragment("right")[lane]
        for half in range(2):
            of_values, of_keys, of_deep = (x[lane][2 * half :][:2] for x in (values, keys, deep))
            assert of_values == [((r, c + 8 * half), (r + 1, c + 8 * half)) for r, c in right]
            assert of_keys == [((c + 8 * half, r), (c + 8 * half, r + 1)) for r, c in right]
            assert of_deep == [((c, r + 16 * half), (c, r + 1 + 16 * half)) for r, c in right]


@pytest.mark.parametrize("granules", [8, 16, 40, 72])
def test_granules_keep_apart(host, granules):
    places = [[host.swizzled(r, g, granules) for g in range(granules)] for r in range(32)]
    assert sorted(sum(places, [])) == list(range(32 * granules))
    # Eight lanes are served at a time, each of four of the 32 banks.
    for first in range(0, 32, 8):
        for granule in range(granules):
            assert len({places[r][granule] % 8 for r in range(first, first + 8)}) == 8
    for row in places:
        assert all(row[g + 8] == row[g] + 8 for g in range(granules - 8))


@any_example
@given(keys=st.integers(0, 5000), splits=st.integers(1, 144), smallest=st.sampled_from([64, 128]))
def test_splits_cover_the_keys_once(host, keys, splits, smallest):
    parts = host.split_keys(keys, splits, smallest)
    assert 1 <= len(parts) <= splits
    assert parts[0][0] == 0 and parts[-1][1] == keys
    for (_, end), (first, _) in zip(parts, parts[1:], strict=False):
        assert end == first
    assert all(first % smallest == 0 for first, _ in parts)
    assert all(first < end for first, end in parts) or keys == 0


@pytest.mark.parametrize("used", [1, 2, 11, 12, 13, 24, 25, 143, 144])
def test_every_part_is_merged_once(host, used):
    merged = {part: {part} for part in range(used)}
    steps = host.mergers(used)
    for first, *others in steps:
        assert len(others) < 12 and sorted(others) == others
        for part in others:
            merged[first] |= merged.pop(part)
    assert merged == {0: set(range(used))}
    # All but the last step can go on at the same time.
    assert len(steps) == 1 or sorted(sum(steps[:-1], [])) == list(range(used))


@pytest.mark.parametrize(
    ("tiles", "keys", "expected"),
    [
        (8, 8192, 16),  # one round of 128 blocks on 132 processors
        (1, 131072, 128),
        (256, 4096, 1),  # nearly two full rounds
        (140, 4096, 16),  # a second round for 8 blocks would take as long as the first
        (8, 100, 1),
        (8, 0, 1),
    ],
)
def test_the_fewest_splits_that_fill_a_device(host, tiles, keys, expected):
    assert host.fewest_splits(tiles, 132, keys, 128, 144) == expected


@any_example
@given(tiles=st.integers(1, 999), blocks=st.integers(1, 264), keys=st.integers(0, 2**20))
def test_no_number_of_splits_is_much_better(host, tiles, blocks, keys):
    def rounds(splits):
        parts = host.split_keys(keys, splits, 128)
        longest = max(1, max(end - first for first, end in parts))
        return -(-tiles * len(parts) // blocks) * -(-longest // 128)

    chosen = host.fewest_splits(tiles, blocks, keys, 128, 144)
    best = min(rounds(splits) for splits in range(1, 145))
    assert rounds(chosen) <= 1.05 * best
    assert all(rounds(fewer) > 1.05 * best for fewer in range(1, chosen))


maps = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@any_example
@given(q_to_k=maps, tokens=st.integers(1, 16))
def test_there_are_tiles_for_every_map(host, q_to_k, tokens):
    for key_heads in (7, 40):
        needed = sum(-(-q_to_k.count(head) * tokens // 16) for head in set(q_to_k))
        assert needed <= host.most_tiles(len(q_to_k), tokens, key_heads, 16)


def test_some_map_needs_every_tile(host):
    # One reader too many for full tiles, in every group.
    q_to_k = [head for head in range(4) for _ in range(17)]
    assert host.most_tiles(len(q_to_k), 1, 4, 16) == 8


@any_example
@given(q_to_k=maps, head=st.integers(0, 6))
def test_readers_of_a_key_head(host, q_to_k, head):
    expected = [h for h, k in enumerate(q_to_k) if k == head]
    assert host.readers(q_to_k, head) == [*expected, -1]


@any_example
@given(
    table=st.lists(st.lists(st.integers(0, 2**20), min_size=4, max_size=4), min_size=2, max_size=2),
    page_size=st.integers(1, 100),
    token=st.integers(0, 99),
    steps=st.tuples(st.integers(0, 2**40), st.integers(0, 2**20)),
)
def test_tokens_are_where_the_table_says(host, table, page_size, token, steps):
    token %= 4 * page_size
    page, row = table[1][token // page_size], token % page_size
    expected = page * steps[0] + row * steps[1]
    for offset in (host.cached_offset, host.cached_offset_wide):
        assert offset(table, page_size, 1, token, *steps) == expected
        assert offset([], page_size, 1, token, *steps) == steps[0] + token * steps[1]


def test_lengths_are_within_what_there_is(host):
    assert [host.clamped_length(x, 9) for x in (-(2**40), 0, 9, 2**40)] == [0, 0, 9, 9]


@any_example
@given(word=st.integers(0, 2**64 - 1), call=st.integers(1, 2**48 - 1), count=st.integers(1, 144))
def test_tickets_count_from_whatever_memory_holds(host, word, call, count):
    # Whatever it is, but what a block of this very call would have left.
    word = 0 if word >> 16 == call else word
    for _ in range(2):  # Once more as it is, when a graph is replayed.
        lasts = []
        for _ in range(count):
            word, is_last = host.arrive(word, call, count)
            lasts.append(is_last)
        assert lasts == [False] * (count - 1) + [True]
        assert word == 0
