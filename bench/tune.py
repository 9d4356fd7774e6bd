"""A search for the tile of a Triton kernel on the GPU at hand.

Every candidate is a provider like others: it is compiled, compared with fp64, and only then timed,
all of them in the same rounds. What does not compile, is wrong, or kills its process costs that
candidate alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.providers import Call, Provider, Side
from bench.runner import Write
from bench.tiles import Case, Launch, candidates, launch
from bench.worker import Worker
from bench.workloads import Inputs, Workload
from efficient_attn.kernels.triton import configs
from efficient_attn.kernels.triton.measured_tiles import MEASURED, Entry, Tile

# A kernel is compiled in about this many seconds, and its backward besides.
SECONDS_PER_CANDIDATE = 5.0

# How many tiles are tried where the time belongs to other measurements too.
FEW = 8

# Checks and times providers on a workload, and writes a record for each.
Run = Callable[[Workload, list[Provider], Write], None]


@dataclass(frozen=True)
class Candidate:
    """The call of a case with one tile instead of the one in force."""

    entry: Entry
    tile: Tile
    launch: Launch = launch
    side: Side = field(default="ours", init=False)

    @property
    def name(self) -> str:
        rows, columns, warps, stages = self.tile
        return f"{rows}x{columns}, {warps} warps, {stages} stages"

    def available(self, device: str) -> list[str]:
        return []

    def supports(self, workload: Workload) -> list[str]:
        return []

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        call = self.launch(workload, inputs)

        def tried() -> torch.Tensor:
            # It stays for the backward, which comes before the call of the next candidate.
            MEASURED[self.entry] = (self.tile, "being tried")
            return call()

        return tried


def missing() -> list[str]:
    """What a search needs and is not here."""
    reasons = [] if importlib.util.find_spec("triton") else ["Triton is not installed"]
    if not torch.cuda.is_available():
        reasons.append("no CUDA device is visible, or this torch was built without CUDA")
    return reasons


def search(case: Case, run: Run, *, most: int, launch: Launch = launch) -> dict:
    """Try tiles, and return the record of the search.

    Args:
        case: What to tune.
        run: Checks and times; a crash of its process must come back as a record.
        most: How many tiles to try, the one in force included.
        launch: Makes the call of the workload.

    Returns:
        Under ``tile`` the fastest of those that passed, or the one in force where none is faster
        than it beyond noise, or ``None`` where none passed.
    """
    before, kept = configs.chosen(case.entry), MEASURED.get(case.entry)
    tiles = candidates(case.entry, most)
    tried = {c.name: c for c in (Candidate(case.entry, tile, launch) for tile in tiles)}
    records: list[dict] = []
    try:
        run(case.workload, list(tried.values()), records.append)
    finally:
        MEASURED.pop(case.entry, None)
        if kept is not None:
            MEASURED[case.entry] = kept
    outcomes = [
        {
            "tile": list(tried[record["provider"]].tile),
            "status": record["status"],
            "reasons": record["reasons"],
            "seconds": record.get("seconds"),
        }
        for record in records
    ]
    chosen = _chosen(outcomes, before)
    return {
        "kind": "tune",
        "entry": case.entry._asdict(),
        "workload": case.workload.as_record(),
        "before": list(before),
        "tile": chosen,
        "times_as_fast": _times_as_fast(outcomes, before, chosen),
        "tried": outcomes,
    }


def search_on_this_device(case: Case, *, most: int, seconds: float, timeout: float) -> dict:
    """The record of a search in a child process, which is replaced where a candidate kills it."""
    with Worker("cuda", seconds=seconds) as worker:

        def run(workload: Workload, providers: list[Provider], write: Write) -> None:
            worker.run(workload, providers, write, timeout=timeout)

        return search(case, run, most=most)


def pasted(record: dict, device: str) -> str:
    """The line for ``measured_tiles.py``; empty where nothing was found."""
    if record["tile"] is None:
        return ""
    return f"    {Entry(**_with_tuples(record['entry']))}: ({Tile(*record['tile'])}, {device!r}),"


def told(record: dict, device: str) -> str:
    """What a search found, in a few lines."""
    entry, counts = Entry(**_with_tuples(record["entry"])), {}
    for outcome in record["tried"]:
        counts[outcome["status"]] = counts.get(outcome["status"], 0) + 1
    said = ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing tried"
    head = f"{entry.kernel}, {entry.arch}, Triton {entry.triton}, {entry.kind} {entry.size}: {said}"
    if record["tile"] is None:
        return f"{head}; nothing passed, so the tile stays {tuple(record['before'])}"
    gain = record["times_as_fast"]
    beside = (
        "the tile in force did not pass"
        if gain is None
        else f"{gain:.2f}x the tile in force, over the whole call"
    )
    return f"{head}; {beside}. For MEASURED in measured_tiles.py:\n{pasted(record, device)}"


def _chosen(outcomes: list[dict], before: Tile) -> list[int] | None:
    timed = [outcome for outcome in outcomes if outcome["status"] == "timed"]
    if not timed:
        return None
    best = min(timed, key=lambda outcome: outcome["seconds"]["median"])
    stays = _of(timed, before)
    if stays is not None and best["seconds"]["median"] >= stays["seconds"]["low"]:
        return list(before)
    return best["tile"]


def _times_as_fast(outcomes: list[dict], before: Tile, chosen: list[int] | None) -> float | None:
    timed = [outcome for outcome in outcomes if outcome["status"] == "timed"]
    old, new = _of(timed, before), chosen and _of(timed, chosen)
    return old["seconds"]["median"] / new["seconds"]["median"] if old and new else None


def _of(outcomes: list[dict], tile: Tile | list[int]) -> dict | None:
    return next((outcome for outcome in outcomes if outcome["tile"] == list(tile)), None)


def _with_tuples(entry: dict) -> dict:
    return entry | {"size": tuple(entry["size"])}
