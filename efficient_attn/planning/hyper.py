"""The plan of a HyperAttention call: everything that is random or depends on data, as tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_attn.config import MAX_PROJECTIONS, HyperConfig
from efficient_attn.planning import layout
from efficient_attn.planning.blocks import Blocks, ranked_blocks, recent_blocks
from efficient_attn.planning.hashing import directions
from efficient_attn.planning.samples import leaf_samples, segment_samples


class HyperPlan(NamedTuple):
    """Which keys every query attends to, and with what weight.

    A query at position ``p`` (``layout.query_positions``) counts each of these keys once:

    * near: ``[0, sinks)`` and ``layout.near_keys(p)``, weight 1;
    * at each level, its band: keys whose rank at the level lies in ``[band_start, band_end)``,
      weight 1, less those that are near; without block tiles they are known but do not count;
    * its samples, weight ``exp(sample_log_weight)``, less those that are near or in the band of the
      level. A key drawn twice counts twice.

    A kernel walks this in two kinds of tiles, and merges what they give by log-sum-exp:

    * leaf tiles: the queries of a leaf, contiguous near keys, and the sample of the leaf if
      ``samples_by_leaf`` (leaves as numbered by ``layout.leaf_range``);
    * block tiles: the queries ``block_rows[m]`` (-1: none), the keys of ranks ``block_first[m] +
      [0, block_size)`` that are in the query's band, and sample ``block_sample[m]`` if not
      ``samples_by_leaf``. All rows of a tile have the same ``band_start``, which is
      ``block_first[m]``. A query is in at most one tile per level. Tiles come in the order of
      ``block_first``, apart from tiles without rows.

    Rows are the ``G * nq`` queries that read one key head, head by head. Ranks in ``block_first``
    count through all levels: ``level * nk + rank``.

    Shape:
        - key_order, key_rank: ``(B, Hk, L, nk)``, int32, inverse to each other
        - band_start, band_end: ``(B, Hk, L, G * nq)``, int32, ranks within the level
        - block_rows: ``(B, Hk, M, T)``; block_first: ``(B, Hk, M)``, int32
        - block_sample: ``(M,)``, int32, empty if ``samples_by_leaf``
        - sample_keys: ``(Hk, S, m)``, int32; sample_log_weight: ``(S, m)``, fp32; ``S`` is the
          number of leaves, or of segments
    """

    key_order: Tensor
    key_rank: Tensor
    band_start: Tensor
    band_end: Tensor
    block_rows: Tensor
    block_first: Tensor
    block_sample: Tensor
    sample_keys: Tensor
    sample_log_weight: Tensor
    causal: bool
    leaf_size: int
    window: int
    sinks: int
    block_size: int
    samples_by_leaf: bool

    @property
    def is_exact(self) -> bool:
        """Whether nothing is approximated: all keys are near."""
        return self.leaf_size > 0 and self.window >= self.key_order.shape[-1]

    @property
    def is_sampled_by_leaf(self) -> bool:
        """Whether there are samples, and leaves have their own: then the plan has two parts."""
        return self.samples_by_leaf and self.sample_keys.shape[-1] > 0

    def exact_part(self) -> HyperPlan:
        """The same without samples."""
        return self._replace(
            sample_keys=self.sample_keys[..., :0], sample_log_weight=self.sample_log_weight[:, :0]
        )

    def sampled_part(self) -> HyperPlan:
        """The samples of leaves alone, which leave out what is exact for a query as before."""
        # A window that ends before it begins: no key is near.
        return self._replace(
            block_rows=self.block_rows[:, :, :0],
            block_first=self.block_first[:, :, :0],
            sinks=0,
            window=-self.leaf_size,
        )


def make_plan(
    query: Tensor, key: Tensor, *, causal: bool, config: HyperConfig, seed: int
) -> HyperPlan:
    """Hash, sort and draw. Without gradients, and for even groups of query heads.

    A sample depends on the seed, the key head and the place in the sequence, hashing on the seed
    and the data. Neither depends on the batch: a part of a batch has the plan that it has alone.

    Shape:
        - query: ``(B, Hq, nq, D)``; key: ``(B, Hk, nk, D)``
    """
    nq, nk = query.shape[2], key.shape[2]
    query, key = query.detach(), key.detach()
    if nq == 0 or nk < config.exact_below:
        return _exact_plan(query, key, causal)
    if config.is_published:
        return _published_plan(query, key, causal, config, seed)
    return _leaf_plan(query, key, causal, config, seed)


def _published_plan(query, key, causal, config, seed) -> HyperPlan:
    """One sample and sorted blocks for each segment; a segment is everything, or a half."""
    nq, nk = query.shape[2], key.shape[2]
    problems, segment_sizes, leaf = [layout.Problem(0, (0, nq), (0, nk))], [max(nq, nk)], 0
    if causal:
        levels, leaf = layout.recursion_leaf(nk, config.exact_below)
        if levels == 0:
            return _exact_plan(query, key, causal)
        problems = layout.recursion_problems(nq, nk, levels, leaf)
        segment_sizes = [leaf << level for level in range(levels)]
    blocks, block_sample = ranked_blocks(
        *_codes(query, key, causal, config, seed),
        problems,
        segment_sizes,
        corner=nk - nq if causal else 0,
        sinks=0,
        size=min(config.block_size, nk),
        align=config.align_blocks and not causal,
        num_codes=2 ** _num_projections(config, nk),
    )
    return HyperPlan(
        *blocks,
        block_sample,
        *segment_samples(config, problems, key.shape[1], seed, key.device),
        causal=causal,
        leaf_size=leaf,
        window=0,
        sinks=0,
        block_size=min(config.block_size, nk),
        samples_by_leaf=False,
    )


def _leaf_plan(query, key, causal, config, seed) -> HyperPlan:
    """A sample of its own for each leaf, and one hashed block for each query."""
    nq, nk, sinks = query.shape[2], key.shape[2], min(config.sinks, key.shape[2])
    leaf, size = config.leaf_size, min(config.block_size, nk - sinks)
    num_codes = 2 ** _num_projections(config, nk)
    if size == 0:
        blocks = _no_blocks(query, key, levels=0)
    elif causal:
        positions = layout.query_positions(nq, nk, key.device)
        before, _ = layout.near_keys(positions, nk, leaf, config.window, causal)
        codes_of_both = _codes(query, key, causal, config, seed)
        blocks = recent_blocks(*codes_of_both, before, sinks, size, num_codes)
        size = 2 * -(-size // 2)
    else:
        problems = [layout.Problem(0, (0, nq), (0, nk - sinks))]
        codes_of_both = _codes(query, key, causal, config, seed)
        blocks, _ = ranked_blocks(
            *codes_of_both, problems, [max(nq, nk)], 0, sinks, size, config.align_blocks, num_codes
        )
    return HyperPlan(
        *blocks,
        torch.empty(0, dtype=torch.int32, device=key.device),
        *leaf_samples(config, nq, nk, key.shape[1], causal, seed, key.device),
        causal=causal,
        leaf_size=leaf,
        window=config.window,
        sinks=sinks,
        block_size=size,
        samples_by_leaf=True,
    )


def _exact_plan(query: Tensor, key: Tensor, causal: bool) -> HyperPlan:
    """Leaves and a window that reach over everything."""
    nq, nk = query.shape[2], key.shape[2]
    leaf = max(nq, nk, 1)
    none = torch.empty(0, dtype=torch.int32, device=key.device)
    _, num_leaves = layout.leaf_range(nq, nk, leaf, causal)
    sample_keys = none.new_empty(key.shape[1], num_leaves, 0)
    sample_log_weight = torch.empty(num_leaves, 0, device=key.device)
    return HyperPlan(
        *_no_blocks(query, key, levels=0), none, sample_keys, sample_log_weight,
        causal=causal, leaf_size=leaf, window=nk, sinks=0, block_size=0, samples_by_leaf=True,
    )  # fmt: skip


def _no_blocks(query: Tensor, key: Tensor, levels: int) -> Blocks:
    batch, num_heads, nk, _ = key.shape
    num_rows = query.shape[1] // num_heads * query.shape[2]
    shapes = [(levels, nk)] * 2 + [(levels, num_rows)] * 2 + [(0, 0), (0,)]
    return Blocks(*(key.new_empty(batch, num_heads, *s, dtype=torch.int32) for s in shapes))


def _num_projections(config: HyperConfig, nk: int) -> int:
    if config.num_projections is not None:
        return config.num_projections
    average = nk / max(config.block_size, 1)
    return min(max(round(math.log2(max(average, 1))), 1), MAX_PROJECTIONS)


def _codes(query, key, causal, config, seed) -> tuple[Tensor, Tensor]:
    """The codes of queries, ``(B, Hk, G, nq)``, and of keys, ``(B, Hk, nk)``."""
    nq, nk = query.shape[2], key.shape[2]
    normals = directions(seed, key.shape[-1], MAX_PROJECTIONS, key.device)
    bits = _num_projections(config, nk)
    # A key is met from later leaves only, so its own leaf is past; that of a query is not.
    leaf = config.leaf_size if causal and not config.is_published else 0
    q_codes, k_codes = (
        torch.ops.efficient_attn.lsh_codes(x, normals, bits, config.center, leaf, first, own)
        for x, first, own in ((query, nk - nq, False), (key, 0, True))
    )
    return q_codes.unflatten(1, (key.shape[1], -1)), k_codes
