"""Tables of documentation, made from the results that they quote.

A page holds ``<!-- table: PATH -->`` and ``<!-- end of table -->``; what is between them is
replaced by the tables of the results file at that path, relative to the checkout. Behind
``<!-- goals -->`` stands the table of goals, measured by all files of results, and their rooflines.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench.conversion_report import conversion_rows
from bench.diffqkv_report import diffqkv_rows
from bench.environment import ROOT
from bench.generate import ratio_to_torch
from bench.goals import devices, goal_rows, timings
from bench.grouping_report import grouping_rows
from bench.key_driven import HEADS, layer_rows
from bench.plan_report import plan_rows
from bench.quality_report import quality_rows
from bench.recovery_report import recovery_rows
from bench.replay import replay_rows
from bench.replay_steps import step_rows
from bench.report import (
    NOT_MEASURED,
    environment_of,
    first,
    ratios,
    read_records,
    share_of_peak,
)
from bench.roofline import by_kind, draw_rooflines, panels

TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
GOALS_TABLE = re.compile(r"(<!-- goals -->\n).*?(<!-- end of goals -->)", re.DOTALL)


def filled(page: str, root: Path = ROOT) -> str:
    """A page in Markdown with every table made anew."""

    def made(match: re.Match) -> str:
        return f"{match[1]}\n{markdown(read_records(root / match[2]))}\n\n{match[3]}"

    def goals(match: re.Match) -> str:
        files = _timed_files(root)
        heads, *rows = goal_rows(files)
        parts = [f"{devices(files)}.", _table(heads, rows), *_roofline_links(files)]
        return f"{match[1]}\n" + "\n\n".join([*parts, match[2]])

    return GOALS_TABLE.sub(goals, TABLE.sub(made, page))


def draw_figures(path: Path, root: Path = ROOT) -> list[Path]:
    """Draw what a page shows beside its tables, into the folder that has its name."""
    if not GOALS_TABLE.search(path.read_text(encoding="utf-8")):
        return []
    return draw_rooflines(_timed_files(root), path.parent / path.stem)


def _timed_files(root: Path) -> list[list[dict]]:
    paths = sorted((root / "bench" / "results").rglob("*.jsonl"))
    return [records for path in paths if timings(records := read_records(path))]


def _roofline_links(files: list[list[dict]]) -> list[str]:
    links = []
    for kind, of_kind in by_kind(files).items():
        name = {"cpu": "CPU", "cuda": "GPU"}[kind]
        if any(map(panels, of_kind)):
            links.append(f"![{name}: FLOP/s over FLOP per byte](goals/roofline-{kind}.png)")
        else:
            links.append(f"{name}: no roofline, since nothing is measured yet.")
    return links


def markdown(records: list[dict]) -> str:
    """Where the results were taken, and a table for each kind of them."""
    tables = [
        _attention_table(records),
        _estimate_table(records),
        _cache_table(records),
        _bytes_table(records),
        _generation_table(records),
        _table(HEADS, layer_rows(records)),
        *(_table(heads, rows) for heads, *rows in (replay_rows(records), step_rows(records))),
    ]
    quoted = (
        *quality_rows(records),
        *conversion_rows(records),
        *grouping_rows(records),
        *recovery_rows(records),
        *plan_rows(records),
        *diffqkv_rows(records),
    )
    for heading, (heads, *rows) in quoted:
        tables.append(f"**{heading}**\n\n{_table(heads, rows)}")
    return "\n\n".join([_origin(records), *(table for table in tables if table)])


def _origin(records: list[dict]) -> str:
    environment, ceilings = environment_of(records), first(records, "ceilings")
    said = [
        f"{environment['device']}, {environment['threads']} threads",
        f"torch {environment['torch']}",
        f"commit {environment['commit']}",
    ]
    reads = [ceilings[key] for key in ("read_bytes_per_second",) if key in ceilings]
    reads += [r["bytes_per_second"] for r in records if r.get("side") == "ceiling"]
    if reads:
        said.append(f"reads {max(reads) / 1e9:.1f} GB/s at best")
    return "; ".join(said) + "."


def _attention_table(records: list[dict]) -> str:
    results = [r for r in records if r["kind"] == "result" and r["status"] == "timed"]
    by_name = {(r["workload"]["name"], r["provider"]): r for r in results}
    rows = []
    for ratio in ratios(records):
        ours, best = by_name[ratio.workload, ratio.ours], by_name[ratio.workload, ratio.baseline]
        if ours["workload"]["op"] != "attention":
            continue
        share = share_of_peak(ours, records)
        rows.append(
            (
                f"`{ratio.workload}`",
                f"{ours['seconds']['median'] * 1e3:.1f}",
                NOT_MEASURED if share is None else f"{share:.0%}",
                ratio.baseline,
                f"{best['seconds']['median'] * 1e3:.1f}",
                f"**{ratio.value:.2f}**",
                *(f"{x['memory']['peak_bytes'] / 1e6:.1f}" for x in (ours, best)),
            )
        )
    heads = ("workload", "ours, ms", "of peak", "fastest of torch", "ms")
    return _table((*heads, "ratio", "ours, MB at most", "its MB"), rows)


def _estimate_table(records: list[dict]) -> str:
    results = [r for r in records if r["kind"] == "result" and r["status"] == "timed"]
    by_name = {(r["workload"]["name"], r["provider"]): r for r in results}
    rows = []
    for ratio in ratios(records):
        ours, best = by_name[ratio.workload, ratio.ours], by_name[ratio.workload, ratio.baseline]
        if ours["workload"]["op"] != "hyper":
            continue
        result = ours["memory"]["result_bytes"]
        rows.append(
            (
                f"`{ratio.workload}`",
                f"{ours['seconds']['median'] * 1e3:.1f}",
                ratio.baseline,
                f"{best['seconds']['median'] * 1e3:.0f}",
                f"**{ratio.value:.1f}**",
                f"{ratio.low:.1f}-{ratio.high:.1f}",
                f"{(ours['memory']['peak_bytes'] - result) / result:.2f}",
            )
        )
    heads = ("workload", "ours, ms", "fastest exact of torch", "ms", "ratio", "from 20% to 80%")
    return _table((*heads, "memory beyond results, in results"), rows)


def _cache_table(records: list[dict]) -> str:
    results = [r for r in records if r["kind"] == "result" and r["status"] == "timed"]
    by_name = {(r["workload"]["name"], r["provider"]): r for r in results}
    rows = []
    for ratio in ratios(records):
        grouped = [
            record["seconds"]["median"]
            for (workload, provider), record in by_name.items()
            if workload == ratio.workload and "-gqa" in provider and record["side"] == "torch"
        ]
        ours, best = by_name[ratio.workload, ratio.ours], by_name[ratio.workload, ratio.baseline]
        if ours["workload"]["op"] in ("attention", "hyper"):
            continue
        share = share_of_peak(ours, records)
        rows.append(
            (
                f"`{ratio.workload}`",
                f"{ours['workload']['minimal_bytes'] / 1e6:.1f}",
                f"{ours['seconds']['median'] * 1e3:.2f}",
                f"{ours['bytes_per_second'] / 1e9:.1f}",
                NOT_MEASURED if share is None else f"{share:.0%}",
                ratio.baseline,
                f"{best['seconds']['median'] * 1e3:.2f}",
                f"**{ratio.value:.2f}**",
                f"{min(grouped) / ours['seconds']['median']:.1f}" if grouped else "",
            )
        )
    heads = ("workload", "MB read", "ours, ms", "GB/s", "of peak", "fastest of torch", "ms")
    return _table((*heads, "ratio", "over `enable_gqa`"), rows)


def _bytes_table(records: list[dict]) -> str:
    """How time follows bytes: other maps beside even groups of the same width, dtype and length.

    Two workloads share no rounds, so each is seen relative to the ceiling that was timed with it.
    """
    ours = [
        record
        for record in records
        if record["kind"] == "result"
        and record["side"] == "ours"
        and record["status"] == "timed"
        and record["workload"]["suite"] == "decode-maps"
    ]
    even = [record for record in ours if _groups_evenly(record["workload"])]
    rows = []
    for record in ours:
        of_its_kind = [other for other in even if _alike(record["workload"], other["workload"])]
        for other in of_its_kind if record not in even else ():
            saved = other["workload"]["minimal_bytes"] / record["workload"]["minimal_bytes"]
            shares = [share_of_peak(each, records) for each in (record, other)]
            if None in shares:
                continue
            names = (f"`{each['workload']['name']}`" for each in (record, other))
            faster = saved * shares[0] / shares[1]
            percent = (f"{share:.0%}" for share in shares)
            rows.append((*names, f"{saved:.2f}", *percent, f"{faster:.2f}"))
    heads = ("workload", "beside", "times fewer bytes", "of peak", "its", "times as fast")
    return _table(heads, rows)


def _groups_evenly(workload: dict) -> bool:
    return workload["q_to_k"] is None and workload["k_heads"] == workload["v_heads"]


def _alike(one: dict, other: dict) -> bool:
    """Whether two workloads cache as many value heads, of the same width, dtype and length."""
    keys = ("v_heads", "d_v", "dtype", "num_keys", "batch", "num_queries")
    return all(one[key] == other[key] for key in keys)


def _generation_table(records: list[dict]) -> str:
    rows = [
        (
            str(record["context"]),
            record["contender"],
            f"{record['tokens_per_second']:.2f}" if "tokens_per_second" in record else "",
            ratio_to_torch(record, records),
            f"{record['error']:.1e}",
        )
        for record in records
        if record["kind"] == "generate"
    ]
    return _table(("context", "attention, cache", "tokens/s", "ratio", "error of the logits"), rows)


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
