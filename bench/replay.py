"""The decoding experiment of the Sigma paper, with a cache in both its arms that never copies.

All layers of a Sigma-1.5B decode a few tokens behind a prefix of random rows. As in the paper
(Lin et al., arXiv 2501.13629, section 2.3), three parts of a layer are timed: adding to the cache,
attention, and the augmented query; the baseline has 16 key and 16 value heads and no augmented
query. The paper's baseline grows its cache by concatenation, which copies all of it at every token;
here both arms write into memory that is there, and both are attended to by the same op. How that
op compares with torch is what the decode suites measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from bench.runner import Write
from efficient_attn import attention, attention_decode
from efficient_attn.cache import StaticCache
from efficient_attn.layers import DiffQKVAttention

LAYERS, EMBED, HEADS, DIM = 26, 2048, 32, 64
ROUNDS = 3
# At most this many times the error of torch's own op in the same dtype, plus a floor.
FACTOR, FLOOR = 2.0, 1e-3


@dataclass(frozen=True)
class Arm:
    """One arrangement of heads."""

    name: str
    key_heads: int
    value_heads: int
    augmented_query_dim: int = 0


ARMS = (
    Arm("GQA 32/16/16", 16, 16),
    Arm("DiffQKV 32/4/16", 4, 16),
    Arm("DiffQKV 32/4/16, augmented query", 4, 16, augmented_query_dim=3072),
)
BASELINE = ARMS[0].name


def replay(prefix: int, dtype: torch.dtype, device: str, write: Write, *, tokens: int = 10) -> None:
    """Check and time every arm behind ``prefix`` cached tokens, and write one record for each."""
    torch.manual_seed(0)
    runs = {arm: Run(arm, prefix, tokens, dtype, device) for arm in ARMS}
    allowed = FLOOR + FACTOR * runs[ARMS[0]].error(_plainly)
    errors = {arm: run.error(_by_ours) for arm, run in runs.items()}
    seconds: dict[Arm, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number in range(ROUNDS + 1):
        for arm in ARMS[:: -1 if number % 2 else 1]:
            parts = runs[arm].decode(tokens)
            if number:  # the first round warms up
                seconds[arm].append(parts)
    for arm in ARMS:
        right = errors[arm] <= allowed
        record = {
            "kind": "replay",
            "arm": arm.name,
            "prefix": prefix,
            "layers": LAYERS,
            "new_tokens": tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "status": "timed" if right else "wrong",
            "error": errors[arm],
            "error_limit": allowed,
            "cache_bytes_per_token": runs[arm].bytes_per_token,
        }
        if right:
            record["seconds_per_token"] = {
                part: median(each[part] for each in seconds[arm]) / tokens
                for part in seconds[arm][0]
            }
        write(record)


class Run:
    """The layers and caches of one arm."""

    def __init__(self, arm: Arm, prefix: int, room: int, dtype: torch.dtype, device: str) -> None:
        factory = {"device": device, "dtype": dtype}
        self.arm = arm
        # Projections are not timed, so one layer's weights serve all but the augmented query.
        heads = {"num_key_heads": arm.key_heads, "num_value_heads": arm.value_heads}
        options = {"augmented_query_dim": arm.augmented_query_dim, "causal": True}
        self.layers = [
            DiffQKVAttention(EMBED, HEADS, head_dim=DIM, **heads, **options, **factory).eval()
            for _ in range(LAYERS if arm.augmented_query_dim else 1)
        ]
        rows = self.layers[0].cache_rows
        self.caches = [StaticCache(rows, 1, prefix + room, **factory) for _ in range(LAYERS)]
        for cache in self.caches:
            cache.append(*(torch.randn(1, h, prefix, DIM, **factory) for h in self.head_counts))
        self.query = torch.randn(1, HEADS, 1, DIM, **factory)
        self.new = [torch.randn(1, h, 1, DIM, **factory) for h in self.head_counts]

    @property
    def head_counts(self) -> tuple[int, int]:
        return self.arm.key_heads, self.arm.value_heads

    @property
    def bytes_per_token(self) -> int:
        return LAYERS * self.layers[0].cache_rows.bytes_per_token(self.query.dtype)

    @torch.no_grad()
    def error(self, attend: Callable[[Tensor, StaticCache], Tensor]) -> float:
        """Of one layer's attention, relative to the same in fp64."""
        cache = self.caches[0]
        key, value = cache.filled()
        truth = attention(self.query.double(), key.double(), value.double())
        return float((attend(self.query, cache) - truth).norm() / truth.norm())

    @torch.no_grad()
    def decode(self, tokens: int) -> dict[str, float]:
        """Seconds in each part for so many tokens; the cache is as long as before afterwards."""
        spent = {"cache": 0.0, "attention": 0.0, "augmented query": 0.0}
        projected = self.query.view(1, 1, HEADS * DIM)
        length = self.caches[0].longest

        def timed(part: str, step: Callable[[], object]) -> None:
            begun = time.perf_counter()
            step()
            if self.query.device.type == "cuda":
                torch.cuda.synchronize()
            spent[part] += time.perf_counter() - begun

        for _ in range(tokens):
            if self.arm.augmented_query_dim:
                timed("augmented query", lambda: [x.augment(projected) for x in self.layers])
            timed("cache", lambda: [cache.append(*self.new) for cache in self.caches])
            timed("attention", lambda: [_by_ours(self.query, cache) for cache in self.caches])
        for cache in self.caches:
            cache.crop(length)
        return spent


def _by_ours(query: Tensor, cache: StaticCache) -> Tensor:
    return attention_decode(query, *cache.parts, cache_lengths=cache.lengths)


def _plainly(query: Tensor, cache: StaticCache) -> Tensor:
    """The formula in the dtype of the cache, for as much error as may be made."""
    key, value = cache.filled()
    packed = query.view(1, key.shape[1], -1, DIM)
    scores = (packed * DIM**-0.5 @ key.mT).float().softmax(-1).to(query.dtype)
    return (scores @ value).view(1, HEADS, 1, DIM)


def replay_rows(records: list[dict]) -> list[tuple[str, ...]]:
    """Headings and rows of the table."""
    heads = ("prefix", "dtype", "heads", "cache", "attention", "augmented query", "ms", "ratio")
    rows = [heads]
    timed = [r for r in records if r["kind"] == "replay" and r["status"] == "timed"]
    totals = {(r["prefix"], r["dtype"], r["arm"]): sum(r["seconds_per_token"].values())
              for r in timed}  # fmt: skip
    for record in timed:
        prefix, dtype = record["prefix"], record["dtype"]
        total = totals[prefix, dtype, record["arm"]]
        parts = (f"{second * 1e3:.2f}" for second in record["seconds_per_token"].values())
        ratio = totals[prefix, dtype, BASELINE] / total
        rows.append(
            (str(prefix), dtype, record["arm"], *parts, f"{total * 1e3:.2f}", f"{ratio:.2f}")
        )
    return rows
