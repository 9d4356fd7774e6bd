"""Everything that needs a GPU in one go of limited time, most valuable first; last, tiles.

Every result is on the disk before the next is begun, so the run may be killed at any moment.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.ceilings import measure_ceilings, measure_gather
from bench.environment import ROOT, clocks, describe, device_name, without_paths
from bench.measure import clock_for
from bench.planning import measure_planning
from bench.plot import draw
from bench.providers import Provider, left_out
from bench.report import ResultsFile, read_records
from bench.runner import Write
from bench.substituted_lse import probe
from bench.tiles import architecture, case
from bench.tune import FEW, SECONDS_PER_CANDIDATE, search_on_this_device, told
from bench.worker import Worker
from bench.workloads import Workload

RESULTS = "results.jsonl"
TEST_COMMAND = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rf", "-p", "no:cacheprovider")
TEST_SECONDS, TEST_SHARE = 30.0, 0.4
SECONDS_PER_PROVIDER = 0.3
# A workload costs its set-up, and about this many calls at this rate over all providers.
SETUP_SECONDS, CALLS, FLOPS_PER_SECOND, BYTES_PER_SECOND = 6.0, 50, 3e14, 5e11
_FIRST_STAGES = (
    ("environment", 0.0),
    ("ceilings", 0.0),
    ("gather bandwidth", 0.0),
    ("tests", TEST_SECONDS),
    ("substituted log-sum-exp", 0.0),
    ("planning of estimates", 5.0),
)
_LAST_STAGE = ("clocks", 0.0)
# Kept back for the figures.
RESERVE_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """A piece of the run: it starts only if ``seconds``, its likely cost, are left."""

    name: str
    seconds: float
    run: Callable[[float], None]


def run_jobs(
    jobs: list[Job],
    write: Write,
    *,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> None:
    """Run jobs in their order while time lasts.

    A job that no longer fits is recorded as skipped, and smaller ones after it still get their
    turn. A job that raises is recorded as failed and does not end the run.

    Args:
        jobs: Most valuable first; each is told the seconds that are left.
        write: Receives the records.
        seconds: The time for all jobs.
        now: The present time in seconds.
        say: Receives one line about each job.
    """
    start = now()
    for job in jobs:
        begun = now()
        left = seconds - (begun - start)
        if left < job.seconds:
            write({"kind": "job", "job": job.name, "status": "skipped", "seconds_left": left})
            say(f"{left:5.0f} s left  skipped {job.name}")
            continue
        say(f"{left:5.0f} s left  {job.name}")
        record = {"kind": "job", "job": job.name, "status": "done"}
        try:
            job.run(left)
        except Exception as error:
            reason = without_paths(f"{type(error).__name__}: {error}".partition("\n")[0])
            record |= {"status": "failed", "reason": reason}
            say(f"              failed: {reason}")
        write(record | {"seconds": now() - begun})


def list_jobs(
    workloads: list[Workload], *, minutes: float, reason: str, kernels: tuple[str, ...] = ()
) -> list[dict]:
    """The stages of a run in their order, none of them run, and which would fit into its time."""
    left = 60 * minutes - RESERVE_SECONDS
    stages = [(name, seconds) for name, seconds in _FIRST_STAGES]
    stages += [(w.name, estimate(w)) for w in sorted(workloads, key=lambda w: w.rank)]
    stages += [(f"tune {kernel}", FEW * SECONDS_PER_CANDIDATE) for kernel in kernels]
    listed = []
    for name, seconds in [*stages, _LAST_STAGE]:
        record = {"kind": "job", "job": name, "status": "skipped", "likely_seconds": seconds}
        record["reason"] = reason if seconds <= left else f"{left:.0f} s would be left; {reason}"
        left -= seconds if seconds <= left else 0.0
        listed.append(record)
    return listed


def estimate(workload: Workload) -> float:
    """Seconds that a workload is likely to take with all its providers."""
    call = workload.flops() / FLOPS_PER_SECOND + workload.minimal_bytes() / BYTES_PER_SECOND
    return SETUP_SECONDS + CALLS * call


def run_everything(
    folder: Path,
    workloads: list[Workload],
    providers: list[Provider],
    *,
    minutes: float,
    device: str = "cuda",
    test_command: tuple[str, ...] = TEST_COMMAND,
    kernels: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Ceilings, tests, probes, workloads by rank, tiles of ``kernels``: all into ``folder``.

    Returns:
        The records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS
    ranked = sorted(workloads, key=lambda workload: workload.rank)
    with ResultsFile(path) as results, Worker(device, seconds=SECONDS_PER_PROVIDER) as worker:

        def environment(left: float) -> None:
            results.write({"kind": "environment", **describe(device)})
            for reason, names in left_out(providers, device).items():
                results.write({"kind": "left out", "providers": names, "reason": reason})

        def ceilings(left: float) -> None:
            dtypes = sorted({workload.dtype for workload in workloads})
            results.write(measure_ceilings(device, clock_for(device), dtypes))

        def gather(left: float) -> None:
            results.write(measure_gather(device, clock_for(device)))

        def tests(left: float) -> None:
            results.write(run_tests(test_command, folder / "tests.txt", TEST_SHARE * left))

        def substituted_lse(left: float) -> None:
            for record in probe(device):
                results.write(record)
            free_memory()

        def planning(left: float) -> None:
            for record in measure_planning(device, clock_for(device)):
                results.write(record)
            free_memory()

        def free_memory() -> None:
            # The workloads need the memory, and they run in another process.
            if device == "cuda":
                torch.cuda.empty_cache()

        def job_of(workload: Workload) -> Job:
            likely = estimate(workload)

            def run(left: float) -> None:
                timeout = min(left, max(90.0, 4 * likely))
                worker.run(workload, providers, results.write, timeout=timeout)

            return Job(workload.name, likely, run)

        def tuning_of(kernel: str) -> Job:
            likely = FEW * SECONDS_PER_CANDIDATE

            def run(left: float) -> None:
                limits = {"seconds": SECONDS_PER_PROVIDER, "timeout": min(left, 4 * likely)}
                found = search_on_this_device(case(kernel, architecture()), most=FEW, **limits)
                results.write(found)
                say(told(found, device_name(device)))

            return Job(f"tune {kernel}", likely, run)

        def last_clocks(left: float) -> None:
            results.write({"kind": "clocks", "clocks": clocks()})

        steps = (environment, ceilings, gather, tests, substituted_lse, planning)
        jobs = [
            *(Job(*stage, step) for stage, step in zip(_FIRST_STAGES, steps, strict=True)),
            *map(job_of, ranked),
            *map(tuning_of, kernels),
            Job(*_LAST_STAGE, last_clocks),
        ]
        run_jobs(jobs, results.write, seconds=60 * minutes - RESERVE_SECONDS, say=say)
    records = read_records(path)
    draw(records, folder)
    return records


def run_tests(command: tuple[str, ...], log: Path, seconds: float) -> dict:
    """Run the tests in a process of their own; the log keeps what they said up to the end."""
    with log.open("w", encoding="utf-8") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds
            )
            exit_code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            exit_code = None
    said = without_paths(log.read_text(encoding="utf-8", errors="replace"))
    log.write_text(said, encoding="utf-8")
    lines = said.strip().splitlines()
    return {
        "kind": "tests",
        "exit_code": exit_code,
        "timed_out": exit_code is None,
        "summary": lines[-1] if lines else "",
    }
