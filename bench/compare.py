"""What changed between two results files, beyond noise.

Compared are ratios to torch, not times: the torch provider was timed in the same rounds, so a
slower or busier machine moves both. The baseline is the fastest torch provider known to both files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from bench.report import Ratio, environment_of, ratios

Verdict = Literal["slower", "faster", "same"]

# Smaller changes are not called changes, however quiet both runs were.
THRESHOLD = 0.05
TOLD_APART = ("device", "torch", "triton", "cuda", "cudnn", "threads")


@dataclass(frozen=True)
class Change:
    """The ratio of one workload before and after."""

    before: Ratio
    after: Ratio

    @property
    def factor(self) -> float:
        return self.after.value / self.before.value

    @property
    def verdict(self) -> Verdict:
        """A change counts if the spreads of the two ratios do not overlap and it is not tiny."""
        if self.after.high < self.before.low and self.factor < 1 - THRESHOLD:
            return "slower"
        if self.after.low > self.before.high and self.factor > 1 + THRESHOLD:
            return "faster"
        return "same"


def changes(before: list[dict], after: list[dict]) -> list[Change]:
    """The workloads that both files timed, in the order of the second."""
    found = []
    for name in dict.fromkeys(ratio.workload for ratio in ratios(after)):
        old, new = ([r for r in records if _is_of(r, name)] for records in (before, after))
        common = _timed_torch(old) & _timed_torch(new)
        by_provider = {ratio.ours: ratio for ratio in ratios(old, common)}
        for ratio in ratios(new, {b.baseline for b in by_provider.values()}):
            if ratio.ours in by_provider:
                found.append(Change(by_provider[ratio.ours], ratio))
    return found


def differences_of_environment(before: list[dict], after: list[dict]) -> list[str]:
    """What makes two files hard to compare."""
    old, new = environment_of(before), environment_of(after)
    return [
        f"{key}: {old.get(key)} before, {new.get(key)} after"
        for key in TOLD_APART
        if old.get(key) != new.get(key)
    ]


def print_changes(found: list[Change], console: Console) -> None:
    """A table of ratios before and after."""
    table = Table()
    for column in ("workload", "against", "before", "after", "change", "verdict"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    colors = {"slower": "red", "faster": "green", "same": "dim"}
    for change in found:
        color = colors[change.verdict]
        table.add_row(
            change.after.workload,
            change.after.baseline,
            f"{change.before.value:.2f}",
            f"{change.after.value:.2f}",
            f"{change.factor - 1:+.0%}",
            f"[{color}]{change.verdict}[/]",
        )
    console.print(table)


def _is_of(record: dict, workload: str) -> bool:
    return record["kind"] == "result" and record["workload"]["name"] == workload


def _timed_torch(records: list[dict]) -> set[str]:
    return {r["provider"] for r in records if r["side"] == "torch" and r["status"] == "timed"}
