"""Kernels whose tiles can be tuned: the call on which each is timed, and the tiles it may take.

Tables have more: `grad_bias`, tiles of calls with a bias, and those of paged caches. They are not
tuned, since no workload makes such a call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import efficient_attn as ea
from bench.estimate import plan_of
from bench.providers.kernels import CacheKernel
from bench.providers.ours import Ours
from bench.providers.protocol import Call
from bench.suites import UNEVEN_32
from bench.workloads import DTYPES, HYPER_CONFIGS, SHORT_DTYPES, Inputs, Workload, length_label
from efficient_attn.kernels.triton import configs
from efficient_attn.kernels.triton.measured_tiles import Entry, Tile

# Most valuable first.
KERNELS = (
    "forward",
    "decode",
    "hyper_forward",
    "latent_decode",
    "grad_key_value",
    "grad_query",
    "hyper_grad_key_value",
    "hyper_grad_query",
)
ROWS_OF_CACHES = (16, 32, 64)
LATENT_DIMS = (576, 512)

ROWS, COLUMNS, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
# Registers of a thread that accumulators and scores may take; the rest is for addresses and tiles.
MOST_REGISTERS = 192

Launch = Callable[[Workload, Inputs], Call]


@dataclass(frozen=True)
class Case:
    """A kernel, where its tile stands in the tables, and the call on which it is timed."""

    kernel: str
    entry: Entry
    workload: Workload


def architecture() -> str:
    """The family of tables that serves the GPU at hand."""
    return configs.architecture(torch.device("cuda"))


def case(
    kernel: str,
    arch: str,
    *,
    dims: tuple[int, int] = (128, 128),
    dtype: str = "bfloat16",
    window: int | None = None,
    rows: int = 16,
) -> Case:
    """A kernel with head dims of queries and values, on a call that torch's kernels do not answer.

    Args:
        kernel: One of ``KERNELS``.
        arch: The family of the device.
        dims: Of queries and of values; a latent row is 512 + 64 wide whatever they are.
        dtype: A key of ``DTYPES``.
        window: How many keys on the left are visible; ``None`` means all. Not for caches.
        rows: Query rows on one key head, for caches.

    Raises:
        ValueError: The kernel is not one of those, or it does not take what is asked for.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; there are {', '.join(KERNELS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; there are {', '.join(DTYPES)}.")
    if not all(8 <= dim <= 256 for dim in dims):
        raise ValueError(f"head dims are {dims}; the kernels take 8 to 256.")
    if rows not in ROWS_OF_CACHES:
        raise ValueError(f"rows is {rows}; a tile of a cache has one of {ROWS_OF_CACHES}.")
    if window is not None and (kernel.startswith("hyper") or kernel.endswith("decode")):
        raise ValueError(f"a window has no tile of its own in {kernel}; leave it out.")
    size = DTYPES[dtype].itemsize
    if kernel.endswith("decode"):
        is_latent = kernel == "latent_decode"
        dims = LATENT_DIMS if is_latent else dims
        columns = dims[0] if is_latent else sum(1 << (d - 1).bit_length() for d in dims)
        options = {"latent": is_latent, "paged": False}
        entry = configs.decode_entry(arch, size, rows, columns, **options)
        return Case(kernel, entry, _cached(kernel, dims, dtype, rows))
    with_window = {"with_window_or_softcap": window is not None}
    entry = configs.entry(kernel, arch, size, dims, **with_window)
    return Case(kernel, entry, _attention(kernel, dims, dtype, window))


def _cached(kernel: str, dims: tuple[int, int], dtype: str, rows: int) -> Workload:
    is_latent = kernel == "latent_decode"
    # Four heads on a key head are the most common, and fill no more than the smallest tile.
    group = 4 if rows == 16 and not is_latent else rows
    kv_heads = 1 if is_latent else 8
    return Workload(
        name=f"tune-{kernel}-d{dims[0]}x{dims[1]}-{SHORT_DTYPES[dtype]}-rows{rows}-4k",
        suite="tune",
        device="cuda",
        op="mla_decode" if is_latent else "decode",
        batch=128 if is_latent else 32,
        q_heads=group * kv_heads,
        k_heads=kv_heads,
        v_heads=kv_heads,
        num_queries=1,
        num_keys=4096,
        d_qk=dims[0],
        d_v=dims[1],
        dtype=dtype,
        layout="heads",
    )


def _attention(kernel: str, dims: tuple[int, int], dtype: str, window: int | None) -> Workload:
    is_hyper, length = kernel.startswith("hyper"), 32768 if kernel.startswith("hyper") else 8192
    # An uneven map, since torch's kernels answer where groups are even.
    uneven = tuple(head for head, count in enumerate(UNEVEN_32) for _ in range(count))
    heads = (8, 8, 8) if is_hyper else (32, len(UNEVEN_32), len(UNEVEN_32))
    shared = {"op": "hyper", "hyper": "default"} if is_hyper else {}
    shared |= {} if is_hyper else {"q_to_k": uneven, "q_to_v": uneven}
    parts = [f"tune-{kernel}-d{dims[0]}x{dims[1]}", SHORT_DTYPES[dtype]]
    parts += [] if window is None else [f"window{window}"]
    return Workload(
        name="-".join([*parts, length_label(length)]),
        suite="tune",
        device="cuda",
        q_heads=heads[0],
        k_heads=heads[1],
        v_heads=heads[2],
        num_queries=length,
        num_keys=length,
        d_qk=dims[0],
        d_v=dims[1],
        dtype=dtype,
        window=None if window is None else (window, 0),
        mode="forward_backward" if "grad" in kernel else "forward",
        **shared,
    )


def launch(workload: Workload, inputs: Inputs) -> Call:
    """A call that runs the Triton kernels, also where others would answer it."""
    if workload.op == "hyper":
        options = {"causal": workload.causal, "config": HYPER_CONFIGS[workload.hyper]}
        plan = plan_of(workload, inputs)
        return lambda: ea.hyper_attention(*inputs, plan=plan, **options)
    provider = CacheKernel("triton") if workload.reads_a_cache else Ours()
    return provider.build(workload, inputs)


def candidates(entry: Entry, most: int) -> list[Tile]:
    """The tile in force, then those near it that fit registers and shared memory by estimate."""
    before = configs.chosen(entry)
    grid = itertools.product(ROWS, COLUMNS, WARPS, STAGES)
    tiles = {tile for tile in itertools.starmap(Tile, grid) if _fits(entry, tile)}
    if entry.kernel.endswith("decode"):
        tiles = {tile for tile in tiles if tile.rows == entry.size[0]}
    return sorted(tiles | {before}, key=lambda tile: (_steps(before, tile), tile))[: max(most, 1)]


def _steps(one: Tile, other: Tile) -> float:
    """How many doublings, halvings and stages there are between two tiles."""
    doublings = sum(abs(math.log2(a / b)) for a, b in zip(one[:3], other[:3], strict=True))
    return doublings + abs(one.num_stages - other.num_stages)


def _fits(entry: Entry, tile: Tile) -> bool:
    rows, columns, warps, stages = tile
    # Elements that stay, elements of a stage, and numbers of fp32 that are kept in registers.
    if entry.kernel.endswith("decode"):
        loaded = entry.size[1]
        held, streamed = rows * loaded // 2, columns * loaded
        kept = rows * (loaded // 2 + columns)
    else:
        both, scores = sum(entry.size), rows * columns
        if entry.kernel.endswith("forward"):
            held, streamed = rows * entry.size[0], columns * both
            kept = rows * entry.size[1] + scores
        elif entry.kernel.endswith("grad_query"):
            held, streamed = rows * both, columns * both
            kept = rows * entry.size[0] + 2 * scores
        else:
            held, streamed = columns * both, rows * both
            kept = columns * both + 2 * scores
    # A load is under way while the stage before it is used.
    shared = entry.element_size * (held + streamed * max(1, stages - 1))
    return shared <= configs.SHARED_MEMORY[entry.arch] and kept / (32 * warps) <= MOST_REGISTERS
