"""What a plan promises: exact bookkeeping, unbiased counts, repeatable randomness."""

import math

import pytest
import torch

from efficient_attn.config import HyperConfig
from efficient_attn.planning import make_plan
from efficient_attn.planning.counter import random_bits, random_normal
from efficient_attn.planning.hashing import codes, directions, gray_rank
from efficient_attn.reference.hyper import band_mask, multiplicity

PAPER = HyperConfig.paper(block_size=8, sample_size=8, exact_below=16, num_projections=3)
LEAVES = HyperConfig(
    block_size=8, sample_size=8, leaf_size=8, window=8, sinks=2, exact_below=16, num_projections=3
)
CONFIGS = {
    "paper": PAPER,
    "paper without blocks": HyperConfig.paper(block_size=0, sample_size=8, exact_below=16),
    "paper, centred, one of each interval": HyperConfig.paper(
        block_size=8, sample_size=8, exact_below=16, center=True, replacement=False
    ),
    "leaves": LEAVES,
    "leaves without blocks": HyperConfig(
        block_size=0, sample_size=8, leaf_size=8, window=0, sinks=0, exact_below=2
    ),
    "leaves by rank, with replacement": HyperConfig(
        block_size=9, sample_size=7, leaf_size=4, window=3, exact_below=16, align_blocks=False,
        own_samples=False, replacement=True, center=False,
    ),
}  # fmt: skip
LENGTHS = [(64, 64), (61, 61), (37, 100), (40, 33), (1, 80), (2, 16)]


def tokens(nq, nk, heads=2, group=1, batch=1, dim=8):
    query = torch.randn(batch, heads * group, nq, dim, dtype=torch.float64)
    return query, torch.randn(batch, heads, nk, dim, dtype=torch.float64)


def visible(nq, nk, causal):
    mask = torch.ones(nq, nk, dtype=torch.bool)
    return mask.tril(nk - nq) if causal else mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_visible_key_counts_once_on_average_and_no_other_at_all(name, causal):
    # Heads draw independently, so many heads with the same tokens are many plans at once.
    heads = 96
    for nq, nk in LENGTHS:
        query, key = (x.expand(-1, heads, -1, -1) for x in tokens(nq, nk, heads=1))
        plan = make_plan(query, key, causal=causal, config=CONFIGS[name], seed=3)
        count = multiplicity(plan, nq, nk, 1)[0, :, 0]
        mask = visible(nq, nk, causal)
        assert (count[:, ~mask] == 0).all()
        error = count[:, mask].mean(0) - 1
        # Six standard errors, since there are thousands of pairs.
        assert (error.abs() <= 6 * count[:, mask].std(0) / heads**0.5 + 0.25).all()
        assert error.mean().abs() < 0.03


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("group", [1, 3])
def test_tiles_hold_every_row_that_has_a_band(name, causal, group):
    for nq, nk in LENGTHS:
        query, key = tokens(nq, nk, group=group)
        plan = make_plan(query, key, causal=causal, config=CONFIGS[name], seed=0)
        levels, rows = plan.band_start.shape[2:]
        index = torch.arange(nk).expand(plan.key_order.shape)
        torch.testing.assert_close(
            plan.key_rank.gather(-1, plan.key_order.long()).long(), index, rtol=0, atol=0
        )
        for h in range(2):
            found = torch.zeros(levels, rows, dtype=torch.long)
            for tile, first in zip(
                plan.block_rows[0, h], plan.block_first[0, h].tolist(), strict=True
            ):
                used, level = tile[tile >= 0].long(), first // nk
                found[level, used] += 1
                if plan.block_size:
                    assert (plan.band_start[0, h, level, used] == first % nk).all()
            width = plan.band_end[0, h] - plan.band_start[0, h]
            assert (width >= 0).all() and (width <= plan.block_size).all()
            assert (found <= 1).all()
            assert (found[width > 0] == 1).all()


def test_a_block_of_keys_is_met_by_queries_of_its_rank():
    query, key = tokens(64, 64)
    plan = make_plan(query, key, causal=False, config=PAPER, seed=0)
    normals = directions(0, 8, 3, key.device)
    q_codes, k_codes = (codes(x.float() @ normals, 0.0) for x in (query, key))
    for head in range(2):
        rank_of_query = q_codes[0, head].argsort(stable=True).argsort()
        rank_of_key = k_codes[0, head].argsort(stable=True).argsort()
        expected = (rank_of_query // 8).unsqueeze(1) == rank_of_key // 8
        assert torch.equal(band_mask(plan, 0)[0, head], expected)


def test_under_a_causal_mask_a_query_meets_the_last_keys_of_its_code():
    config = HyperConfig(block_size=8, sample_size=0, leaf_size=8, window=8, sinks=2,
                         exact_below=16, num_projections=2, center=False)  # fmt: skip
    query, key = tokens(96, 96)
    plan = make_plan(query, key, causal=True, config=config, seed=0)
    normals = directions(0, 8, 2, key.device)
    q_codes, k_codes = (codes(x.float() @ normals, 0.0) for x in (query, key))
    for i in range(96):
        before = max(i // 8 * 8 - 8, 0)
        past = [j for j in range(2, before) if k_codes[0, 0, j] == q_codes[0, 0, i]]
        met = band_mask(plan, 0)[0, 0, i].nonzero().flatten().tolist()
        assert sorted(met) == past[len(past) - len(met) :]
        assert len(met) == len(past) if len(past) <= 8 else 4 < len(met) <= 8


@pytest.mark.parametrize("name", ["leaves", "leaves without blocks"])
def test_the_default_causal_plan_never_looks_ahead(name):
    query, key = tokens(96, 96, group=2)
    config = CONFIGS[name]
    plan = make_plan(query, key, causal=True, config=config, seed=0)
    before = multiplicity(plan, 96, 96, 2)
    for t in (17, 40, 64, 95):
        changed = [x.clone() for x in (query, key)]
        for x in changed:
            x[:, :, t:] = 5 * torch.randn_like(x[:, :, t:]) + 3
        plan = make_plan(*changed, causal=True, config=config, seed=0)
        assert torch.equal(multiplicity(plan, 96, 96, 2)[..., :t, :], before[..., :t, :])


def test_the_published_causal_plan_looks_ahead():
    query, key = tokens(96, 96)
    before = multiplicity(make_plan(query, key, causal=True, config=PAPER, seed=0), 96, 96, 1)
    query[:, :, 60:] += 5
    after = multiplicity(make_plan(query, key, causal=True, config=PAPER, seed=0), 96, 96, 1)
    assert not torch.equal(after[..., :60, :], before[..., :60, :])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_part_of_a_batch_has_the_plan_that_it_has_alone(name, causal):
    query, key = tokens(50, 70, group=2, batch=3)
    options = {"causal": causal, "config": CONFIGS[name], "seed": 7}
    whole = make_plan(query, key, **options)
    part = make_plan(query[1:2], key[1:2], **options)
    for name, x, y in zip(whole._fields, whole, part, strict=True):
        if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == 3 and "sample" not in name:
            x = x[1:2]
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_planning_leaves_the_global_generator_alone():
    query, key = tokens(64, 64)
    state = torch.get_rng_state()
    make_plan(query, key, causal=True, config=PAPER, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_heads_leaves_and_segments_draw_independently():
    query, key = tokens(512, 512, heads=4)
    paper = HyperConfig.paper(block_size=8, sample_size=64, exact_below=64)
    leaves = HyperConfig(block_size=0, sample_size=64, leaf_size=64, window=0, sinks=0,
                         exact_below=64, replacement=True)  # fmt: skip
    for config, causal in ((paper, True), (leaves, False)):
        plans = [make_plan(query, key, causal=causal, config=config, seed=s) for s in (0, 1, 2**40)]
        drawn = torch.stack([p.sample_keys for p in plans]).double()
        # As numbers in [0, 1) of equal mean, whatever segment they come from.
        low, high = drawn.amin((0, 1, 3), keepdim=True), drawn.amax((0, 1, 3), keepdim=True)
        drawn = ((drawn - low) / (high - low)).flatten(0, 2) - 0.5
        correlation = torch.corrcoef(drawn)
        correlation.fill_diagonal_(0.0)
        assert correlation.abs().max() < 6 / 64**0.5


def test_leaves_share_random_numbers_on_request():
    query, key = tokens(64, 64)
    config = HyperConfig(block_size=0, sample_size=4, leaf_size=8, window=0, sinks=0,
                         exact_below=16, own_samples=False)  # fmt: skip
    plan = make_plan(query, key, causal=False, config=config, seed=0)
    # The frame of the first leaf is [8, 64), of the last one [0, 56).
    assert torch.equal(plan.sample_keys[:, 0] - 8, plan.sample_keys[:, -1])


@pytest.mark.parametrize("bits", range(1, 17))
def test_b4_consecutive_ranks_differ_in_one_bit(bits):
    code = torch.arange(2**bits)
    order = torch.empty_like(code).scatter_(0, gray_rank(code), code)
    step = order[1:] ^ order[:-1]
    assert ((step & (step - 1)) == 0).all() and (step > 0).all()


def test_codes_agree_as_often_as_the_angle_says():
    angle, bits = torch.tensor(0.6), 3
    x = torch.tensor([1.0, 0.0])
    y = torch.stack([angle.cos(), angle.sin()])
    normals = torch.cat([directions(s, 2, bits, x.device) for s in range(2000)], dim=1)
    same = [codes((v @ normals).view(2000, bits), 0.0) for v in (x, y)]
    rate = (same[0] == same[1]).double().mean()
    assert abs(rate - (1 - angle / math.pi) ** bits) < 4 * 0.5 / 2000**0.5


def test_random_bits_are_uniform_and_repeatable():
    bits = random_bits(5, torch.arange(100).unsqueeze(1), torch.arange(200))
    assert torch.equal(bits[7], random_bits(5, 7, torch.arange(200)))
    assert bits.min() >= 0 and bits.max() < 2**32
    assert bits.unique().numel() > 19_990
    for place in range(32):
        assert abs((bits >> place & 1).double().mean() - 0.5) < 0.02
    normal = random_normal(-3, torch.arange(20_000))
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02


def test_short_sequences_are_exact():
    for causal, below in ((False, 16), (True, 31)):
        for n in (1, below - 1):
            plan = make_plan(*tokens(n, n), causal=causal, config=PAPER, seed=0)
            assert plan.is_exact
        assert not make_plan(*tokens(below, below), causal=causal, config=PAPER, seed=0).is_exact
    assert make_plan(*tokens(0, 5), causal=True, config=LEAVES, seed=0).is_exact


def test_centring_makes_codes_blind_to_a_shift_of_keys_and_queries():
    query, key = tokens(64, 64)
    for causal in (False, True):
        plans = [
            make_plan(query + shift, key - shift, causal=causal, config=LEAVES, seed=0)
            for shift in (0.0, 100.0)
        ]
        same = (plans[0].band_start == plans[1].band_start).double().mean()
        assert same > (0.98 if not causal else 0.9)


def test_no_band_holds_a_sink_however_long_the_sequence():
    # So long that code times length would not fit 32 bits for what sorts last.
    query, key = tokens(8, 70_000, heads=1, dim=2)
    config = HyperConfig(block_size=8, sample_size=0, num_projections=3)
    plan = make_plan(query, key, causal=True, config=config, seed=0)
    assert (plan.key_rank[..., : config.sinks] >= key.shape[2] - config.sinks).all()
    assert (plan.band_end <= key.shape[2] - config.sinks).all()
    assert (plan.band_end > plan.band_start).any()
