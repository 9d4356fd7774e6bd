"""Results as JSON lines, and the numbers that are read off them.

A file holds one ``environment`` and one ``ceilings`` record, and then one ``result`` record for
each workload and provider. Ratios are not stored: they follow from the records by ``ratios``, here
and everywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NOT_MEASURED = "not measured"


class ResultsFile:
    """Appends records, each of which is on the disk before the next is measured."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(record, allow_nan=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(path: Path) -> list[dict]:
    """The records of a file; a last line that was cut off when a run was killed is left out."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"line {number} of {path.name} is not JSON.") from None
    return records


@dataclass(frozen=True)
class Ratio:
    """Time of the fastest torch provider over the time of ours; above 1 we are faster.

    ``low`` and ``high`` follow from the 20/80 quantiles of both times.
    """

    workload: str
    family: str
    num_keys: int
    ours: str
    baseline: str
    value: float
    low: float
    high: float


def ratios(records: Iterable[dict], only_baselines: set[str] | None = None) -> list[Ratio]:
    """One ratio for each of our timed providers on each workload that a torch provider also ran.

    Args:
        records: Records of one file.
        only_baselines: Restrict the choice of the fastest torch provider to these names.
    """
    by_workload: dict[str, list[dict]] = {}
    for record in records:
        if record["kind"] == "result" and record["status"] == "timed":
            by_workload.setdefault(record["workload"]["name"], []).append(record)
    found = []
    for name, timed in by_workload.items():
        baselines = [
            record
            for record in timed
            if record["side"] == "torch"
            and (only_baselines is None or record["provider"] in only_baselines)
        ]
        if not baselines:
            continue
        best = min(baselines, key=lambda record: record["seconds"]["median"])
        for record in timed:
            if record["side"] == "ours":
                found.append(_ratio(name, record, best))
    return found


def _ratio(name: str, ours: dict, baseline: dict) -> Ratio:
    fast, slow = ours["seconds"], baseline["seconds"]
    return Ratio(
        workload=name,
        family=ours["workload"]["family"],
        num_keys=ours["workload"]["num_keys"],
        ours=ours["provider"],
        baseline=baseline["provider"],
        value=slow["median"] / fast["median"],
        low=slow["low"] / fast["high"],
        high=slow["high"] / fast["low"],
    )


def share_of_peak(record: dict, records: list[dict]) -> float | None:
    """How much of what the device can do a timed record reaches; ``None`` if that is not known.

    Measured against the matrix product of its dtype, or where a cache is read against the ceiling
    that was timed in the same rounds, or else the bandwidth of copying.
    """
    ceilings = first(records, "ceilings")
    workload = record["workload"]
    if workload.get("op") == "hyper" and record["side"] in ("ours", "estimate"):
        # Most of the work is not done at all.
        return None
    if workload.get("op", "attention") in ("attention", "hyper"):
        limit = ceilings.get("matmul_flops_per_second", {}).get(workload["dtype"])
        return record["flops_per_second"] / limit if limit else None
    for other in records:
        if (
            other["kind"] == "result"
            and other["side"] == "ceiling"
            and other["workload"]["name"] == workload["name"]
        ):
            return other["seconds"]["median"] / record["seconds"]["median"]
    limit = ceilings.get("copy_bytes_per_second")
    return record["bytes_per_second"] / limit if limit else None


def environment_of(records: Iterable[dict]) -> dict[str, Any]:
    """The environment record of a file, or an empty one."""
    return first(records, "environment")


def print_summary(records: list[dict], console: Console) -> None:
    """A table of every workload: our time, its share of the ceiling, the best of torch, the ratio.

    What was not measured is named as such, with the reason below the table.
    """
    table = Table(title=_title(environment_of(records)), title_justify="left")
    for column in ("workload", "ours ms", "of peak", "best of torch", "ms", "memory", "ratio"):
        names = column in ("workload", "best of torch")
        table.add_column(column, justify="left" if names else "right", overflow="fold")
    compared = {ratio.workload: ratio for ratio in ratios(records)}
    results = [record for record in records if record["kind"] == "result"]
    by_name = {(r["workload"]["name"], r["provider"]): r for r in results}
    for name in dict.fromkeys(record["workload"]["name"] for record in results):
        ratio = compared.get(name)
        if ratio is None:
            table.add_row(name, NOT_MEASURED, "", "", "", "", "")
            continue
        ours, best = by_name[name, ratio.ours], by_name[name, ratio.baseline]
        share = share_of_peak(ours, records)
        table.add_row(
            name,
            f"{ours['seconds']['median'] * 1e3:.2f}",
            NOT_MEASURED if share is None else f"{share:.0%}",
            ratio.baseline,
            f"{best['seconds']['median'] * 1e3:.2f}",
            f"{ours['memory']['workspace_in_expanded_keys']:.2f}",
            f"[{'green' if ratio.value >= 1 else 'yellow'}]{ratio.value:.2f}[/]",
        )
    console.print(table)
    console.print(
        "ratio: fastest torch provider's time over ours. of peak: ours against the matrix product "
        "timed in this run; where a cache is read, against reading as many bytes in the same "
        "rounds (CPU) or the bandwidth of copying (CUDA). memory: ours beyond inputs and results, "
        "in units of K written out per query head."
    )
    for record in results:
        if record["side"] == "estimate" and record["status"] == "timed":
            console.print(
                f"{record['provider']} on {record['workload']['name']}: "
                f"{record['seconds']['median'] * 1e3:.2f} ms, an estimate of another plan, judged "
                "by plausibility alone and compared with nothing",
                highlight=False,
            )
        if record["status"] in ("wrong", "broken"):
            reasons = "; ".join(record["reasons"])
            console.print(
                f"[red]{record['status']}[/] {record['provider']} on "
                f"{record['workload']['name']}: {reasons}",
                highlight=False,
            )


def first(records: Iterable[dict], kind: str) -> dict[str, Any]:
    """The first record of a kind, or an empty one."""
    return next((record for record in records if record["kind"] == kind), {})


def _title(environment: dict[str, Any]) -> str:
    if not environment:
        return "results"
    dirty = " (with local changes)" if environment.get("dirty") else ""
    return (
        f"{environment['device']}, torch {environment['torch']}, "
        f"commit {environment['commit']}{dirty}"
    )
