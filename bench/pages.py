"""Tables of documentation, made from the results that they quote.

A page holds ``<!-- table: PATH -->`` and ``<!-- end of table -->``; what is between them is
replaced by the tables of the results file at that path, relative to the checkout.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench.environment import ROOT
from bench.report import (
    NOT_MEASURED,
    environment_of,
    first,
    ratios,
    read_records,
    share_of_peak,
)

TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(page: str, root: Path = ROOT) -> str:
    """A page in Markdown with every table made anew."""

    def made(match: re.Match) -> str:
        return f"{match[1]}\n{markdown(read_records(root / match[2]))}\n\n{match[3]}"

    return TABLE.sub(made, page)


def markdown(records: list[dict]) -> str:
    """Where the results were taken, and a table for each kind of them."""
    tables = [_attention_table(records), _cache_table(records), _generation_table(records)]
    return "\n\n".join([_origin(records), *(table for table in tables if table)])


def _origin(records: list[dict]) -> str:
    environment, ceilings = environment_of(records), first(records, "ceilings")
    said = [
        f"{environment['device']}, {environment['threads']} threads",
        f"torch {environment['torch']}",
        f"commit {environment['commit']}",
    ]
    for name, key in (("reads", "read_bytes_per_second"), ("copies", "copy_bytes_per_second")):
        if key in ceilings:
            said.append(f"{name} {ceilings[key] / 1e9:.1f} GB/s at best")
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


def _cache_table(records: list[dict]) -> str:
    results = [r for r in records if r["kind"] == "result" and r["status"] == "timed"]
    by_name = {(r["workload"]["name"], r["provider"]): r for r in results}
    rows = []
    for ratio in ratios(records):
        ours, best = by_name[ratio.workload, ratio.ours], by_name[ratio.workload, ratio.baseline]
        if ours["workload"]["op"] == "attention":
            continue
        share = share_of_peak(ours, records)
        grouped = by_name.get((ratio.workload, "sdpa-flash-gqa"))
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
                f"{_times(grouped, ours):.1f}" if grouped else "",
            )
        )
    heads = ("workload", "MB read", "ours, ms", "GB/s", "of peak", "fastest of torch", "ms")
    return _table((*heads, "ratio", "over `enable_gqa`"), rows)


def _generation_table(records: list[dict]) -> str:
    rows = [
        (
            str(record["context"]),
            record["contender"],
            f"{record['tokens_per_second']:.2f}" if "tokens_per_second" in record else "",
            f"{record['error']:.1e}",
        )
        for record in records
        if record["kind"] == "generate"
    ]
    return _table(("context", "attention", "tokens/s", "error of the logits"), rows)


def _times(slow: dict, fast: dict) -> float:
    return slow["seconds"]["median"] / fast["seconds"]["median"]


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
