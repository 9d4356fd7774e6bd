"""What the package sets out to reach, row by row, and what was measured of it.

The goals follow from rooflines of one H200 (790 TFLOP/s of bf16, 4.3 TB/s) and, for CPUs, of two
cores. A goal names the workloads that decide it, so the page of goals fills itself from results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.report import environment_of, ratios, share_of_peak

NOT_YET = "not yet measured"


@dataclass(frozen=True)
class Goal:
    """One row of the page.

    Attributes:
        what: What is computed.
        baseline: What it is compared with.
        ship: What it must reach to be offered.
        goal: What it should reach.
        moonshot: What physics would allow.
        why: Why that is possible.
        workloads: Names of the workloads that decide it, or of pairs of which the second is beside
            the first.
        figure: What is read off their records, a key of ``FIGURES``.
    """

    what: str
    baseline: str
    ship: str
    goal: str
    moonshot: str
    why: str
    workloads: tuple[str | tuple[str, str], ...] = ()
    figure: str = "ratio"


_HYPER = "hyper-paper-mha32-d128-bf16"
_HYPER_CPU = "hyper-paper-mha{}-d64-fp32"
_TWICE = "fastest exact attention of torch"

GOALS = (
    Goal(
        "HyperAttention, full, forward, 32k / 131k", "cuDNN", "22x / 90x", "29x / 120x",
        "41x / 170x", "64 / 256 times fewer operations, balanced at 253 FLOP/B",
        (f"{_HYPER}-full-fwd-32k", f"{_HYPER}-full-fwd-128k"),
    ),
    Goal(
        "HyperAttention, causal, forward, 32k / 131k", "cuDNN", "3.3x / 11x", "4.0x / 13.7x",
        "4.8x / 16.8x", "leaves run at cuDNN's speed; 5.8 / 19.7 times fewer operations",
        (f"{_HYPER}-causal-fwd-32k", f"{_HYPER}-causal-fwd-128k"),
    ),
    Goal(
        "HyperAttention, forward and backward, 32k, full / causal", "cuDNN", "34x / 4.2x",
        "53x / 5.1x", "76x / 7.4x", "no atomics; the backward of a merged log-sum-exp is exact",
        (f"{_HYPER}-full-fwdbwd-32k", f"{_HYPER}-causal-fwdbwd-32k"),
    ),
    Goal(
        "GQA decode, 256 MB of cache and more", "bandwidth of copying", "85 %", "92 %", "97 %",
        "a stream that is only read",
        ("decode-gqa32-8-d128-bf16-b32-4k", "decode-gqa32-8-d128-bf16-graph-128k"), "share",
    ),
    Goal(
        "GQA decode, one sequence, 64/8 heads, 4k / 8k, replayed", "fastest of torch", "1.2x",
        "1.5x", "2x", "7.8 us of bytes at 8k, and 2-5 us that are fixed",
        ("decode-gqa64-8-d128-bf16-graph-4k", "decode-gqa64-8-d128-bf16-graph-8k"),
    ),
    Goal(
        "Uneven head maps, decode, 32 heads on 8", "gathered heads and torch", "2.8x", "3.6x",
        "as even groups", "bytes depend on key and value heads alone",
        ("decode-maps-uneven32-8-d128-bf16-b32-4k",),
    ),
    Goal(
        "Uneven head maps, prefill, 8k forward", "gathered heads and cuDNN", "0.9x", "1.0x", "",
        "gathering costs at most a tenth; nothing is copied",
        ("maps-uneven32-8-d128-bf16-causal-fwd-8k",),
    ),
    Goal(
        "MLA decode, 16 heads, 128 sequences of 4k", "floor of 140 us", "175 us", "155 us",
        "146 us", "each latent is read once, and the arithmetic hides behind it",
        ("decode-mla-heads16-d576x512-bf16-b128-4k",), "microseconds",
    ),
    Goal(
        "MLA decode, 128 heads, 128 sequences of 4k", "best Triton known: 280 TFLOP/s", "300",
        "400", "600 TFLOP/s", "bound by arithmetic; 84 % of peak has been shown",
        ("decode-mla-heads128-d576x512-bf16-b128-4k",), "teraflops",
    ),
    Goal(
        "DiffQKV 32/4/16, decode, 32k / 128k", "GQA-16, ours", "1.3x", "1.5x", "1.58x",
        "1.6 times fewer bytes",
        (
            ("decode-maps-diff32-4-16-d128-bf16-graph-32k",
             "decode-maps-gqa32-16-d128-bf16-graph-32k"),
            ("decode-maps-diff32-4-16-d128-bf16-128k", "decode-maps-gqa32-16-d128-bf16-128k"),
        ), "beside",
    ),
    Goal(
        "DiffQKV 32/4/16, prefill, 8k forward", "repeated keys and cuDNN", "0.75x", "1.0x", "1.05x",
        "as many operations; only the copy is saved",
        ("maps-diff32-4-16-d128-bf16-causal-fwd-8k",),
    ),
    Goal(
        "Any standard shape, forward, 8k / 32k", "fastest of torch", "0.95x", "0.98x", "",
        "it is the same kernel; only the way there can be lost",
        ("prefill-gqa32-8-d128-bf16-causal-fwd-8k", "prefill-gqa32-8-d128-bf16-causal-fwd-32k"),
    ),
    Goal(
        "CPU: HyperAttention, forward, 32k, full / causal", _TWICE, "25x / 3.5x", "40x / 4.5x",
        "48x / 5x", "64 / 5.8 times fewer operations",
        (f"{_HYPER_CPU.format(2)}-full-fwd-32k", f"{_HYPER_CPU.format(2)}-causal-fwd-32k"),
    ),
    Goal(
        "CPU: HyperAttention, forward, 131k, full / causal", _TWICE, "100x / 10x", "150x / 14x",
        "175x / 16x", "256 / 19.7 times fewer operations",
        (f"{_HYPER_CPU.format(1)}-full-fwd-128k", f"{_HYPER_CPU.format(1)}-causal-fwd-128k"),
    ),
    Goal(
        "CPU: GQA decode, 32/8 heads, bf16, 32k", "bandwidth of reading", "75 %", "90 %", "",
        "a stream that is only read", ("decode-gqa32-8-d128-bf16-32k",), "share",
    ),
    Goal(
        "CPU: DiffQKV 32/4/16, decode, bf16, d 128 / 64", "GQA-16, ours", "1.5x", "1.6x", "",
        "1.6 times fewer bytes",
        (
            ("decode-maps-diff32-4-16-d128-bf16-16k", "decode-maps-gqa32-16-d128-bf16-16k"),
            ("decode-maps-diff32-4-16-d64-bf16-32k", "decode-maps-gqa32-16-d64-bf16-32k"),
        ), "beside",
    ),
    Goal(
        "CPU: DiffQKV 32/4/16, 100 values read, 32k, d 64, bf16 / fp32", "all values read", "2x",
        "3x", "4.9x", "keys are a fifth of the bytes; all of them are scored",
        ("decode-selective-diff32-4-16-d64-bf16-32k", "decode-selective-diff32-4-16-d64-fp32-32k"),
        "over_exact",
    ),
)  # fmt: skip


def goal_rows(files: list[list[dict]]) -> list[tuple[str, ...]]:
    """Headings, then a row for each goal.

    Args:
        files: The records of each file of results. A workload counts where it was timed last.
    """
    heads = ("", "compared with", "ship", "goal", "moonshot", "measured", "why it is possible")
    return [
        heads,
        *(
            (g.what, g.baseline, g.ship, g.goal, g.moonshot, _measured(g, files), g.why)
            for g in GOALS
        ),
    ]


def timings(records: list[dict]) -> bool:
    """Whether records hold timed workloads at all."""
    return any(record["kind"] == "result" for record in records)


def devices(files: list[list[dict]]) -> str:
    """Where the results were taken."""
    found = (environment_of(records) for records in files)
    return "; ".join(f"{e['device']}, torch {e['torch']}, commit {e['commit']}" for e in found if e)


def _measured(goal: Goal, files: list[list[dict]]) -> str:
    figures = [FIGURES[goal.figure](workload, files) for workload in goal.workloads]
    if not any(figures):
        return NOT_YET
    return f"**{' / '.join(figure or NOT_YET for figure in figures)}**"


def _ours(workload: str, files: list[list[dict]]) -> tuple[dict, list[dict]] | None:
    """Our record of a workload and the file that it is in."""
    for records in reversed(files):
        for record in records:
            mine = record["kind"] == "result" and record["side"] == "ours"
            if mine and record["status"] == "timed" and record["workload"]["name"] == workload:
                return record, records
    return None


def _ratio(workload: str, files: list[list[dict]]) -> str:
    found = _ours(workload, files)
    if found is None:
        return ""
    values = [r.value for r in ratios(found[1]) if r.workload == workload]
    return f"{max(values):.3g}x" if values else ""


def _share(workload: str, files: list[list[dict]]) -> str:
    found = _ours(workload, files)
    share = share_of_peak(*found) if found else None
    return "" if share is None else f"{100 * share:.0f} %"


def _microseconds(workload: str, files: list[list[dict]]) -> str:
    found = _ours(workload, files)
    return f"{found[0]['seconds']['median'] * 1e6:.0f} us" if found else ""


def _teraflops(workload: str, files: list[list[dict]]) -> str:
    found = _ours(workload, files)
    return f"{found[0]['flops_per_second'] / 1e12:.0f} TFLOP/s" if found else ""


def _beside(pair: tuple[str, str], files: list[list[dict]]) -> str:
    """How many times as fast the first is as the second, both timed in one file."""
    found = [_ours(workload, files) for workload in pair]
    if None in found or found[0][1] is not found[1][1]:
        return ""
    first, second = (record["seconds"]["median"] for record, _ in found)
    return f"{second / first:.2f}x"


def _over_exact(workload: str, files: list[list[dict]]) -> str:
    """How many times as fast a selection is as the package without it, in the same rounds."""
    found = _ours(workload, files)
    for record in found[1] if found else ():
        exact = record["kind"] == "result" and record["provider"] == "efficient_attn-exact"
        if exact and record["status"] == "timed" and record["workload"]["name"] == workload:
            ratio = record["seconds"]["median"] / found[0]["seconds"]["median"]
            return f"{ratio:.2f}x"
    return ""


FIGURES: dict[str, Callable[..., str]] = {
    "ratio": _ratio,
    "share": _share,
    "microseconds": _microseconds,
    "teraflops": _teraflops,
    "beside": _beside,
    "over_exact": _over_exact,
}
