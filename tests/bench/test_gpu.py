import sys

import pytest
import torch

import bench.ceilings
import bench.gpu
from bench.gpu import RESULTS, Job, estimate, list_jobs, run_everything, run_jobs, run_tests
from bench.report import read_records
from bench.substituted_lse import OPS, Part, probe
from bench.suites import SUITES, select
from bench.worker import Worker
from tests.bench.toys import GQA, Stand


def test_jobs_run_in_order_until_the_time_is_spent():
    time = [0.0]
    ran, records = [], []

    def takes(name, seconds):
        def run(left):
            ran.append((name, left))
            time[0] += seconds

        return run

    def fails(left):
        raise RuntimeError("see /a/b/c.cu")

    jobs = [
        Job("first", 0, takes("first", 30)),
        Job("failing", 0, fails),
        Job("second", 40, takes("second", 50)),
        Job("too long", 40, takes("too long", 40)),
        Job("small", 10, takes("small", 10)),
    ]
    run_jobs(jobs, records.append, seconds=100, now=lambda: time[0], say=lambda line: None)
    assert ran == [("first", 100), ("second", 70), ("small", 20)]
    assert [(record["job"], record["status"]) for record in records] == [
        ("first", "done"),
        ("failing", "failed"),
        ("second", "done"),
        ("too long", "skipped"),
        ("small", "done"),
    ]
    assert records[1]["reason"] == "RuntimeError: see c.cu"


def test_the_headlines_fit_well_into_the_time():
    headlines = [workload for workload in select(device="cuda") if workload.rank == 0]
    assert sum(map(estimate, headlines)) < 120
    # What the planner predicts is set beside measurements of other suites' kernels: no headline.
    assert {workload.suite for workload in headlines} == set(SUITES) - {"plan"}


def test_tests_are_ended_when_their_time_is_up(tmp_path):
    log = tmp_path / "tests.txt"
    good = run_tests((sys.executable, "-c", "print('12 passed at /a/b/c.py')"), log, 60)
    assert (good["exit_code"], good["summary"]) == (0, "12 passed at c.py")
    hanging = "import time; print('so far', flush=True); time.sleep(100)"
    late = run_tests((sys.executable, "-c", hanging), log, 3)
    assert late["timed_out"] and late["exit_code"] is None and late["summary"] == "so far"


def test_a_crash_costs_one_provider_only():
    records = []
    stands = [Stand("good"), Stand("bad", fault="crash"), Stand("also good", side="ours")]
    with Worker("cpu", seconds=0.0) as worker:
        worker.run(GQA, stands, records.append, timeout=300)
    status = {record["provider"]: record["status"] for record in records}
    assert status == {"bad": "broken", "good": "timed", "also good": "timed"}


def test_a_hang_is_ended_and_blamed(monkeypatch):
    """Without a process: the pipe says who is at work, and then nothing."""

    class Silent:
        messages = [("trying", "good"), ("trying", "bad")]

        def send(self, message):
            pass

        def poll(self, timeout):
            return bool(self.messages)

        def recv(self):
            return self.messages.pop(0)

    worker, records = Worker("cpu", seconds=0.0), []
    monkeypatch.setattr(worker, "_start", Silent)
    worker.run(GQA, [Stand("good"), Stand("bad")], records.append, timeout=-1)
    assert [(record["provider"], record["status"]) for record in records] == [("bad", "broken")]
    Silent.messages = []
    with pytest.raises(RuntimeError, match="before the time was up"):
        worker.run(GQA, [Stand("good")], records.append, timeout=-1)


def test_everything_on_a_cpu_as_stand_in(tmp_path, monkeypatch):
    sizes = {"MATMUL_SIZE": 64, "COPY_BYTES": 2**16, "READ_BYTES": 2**16, "GATHER_ROWS": 2**8}
    for name, size in sizes.items():
        monkeypatch.setitem(getattr(bench.ceilings, name), "cpu", size)
    found = {"kind": "tune", "tile": [64, 64, 4, 2]}
    monkeypatch.setattr(bench.gpu, "architecture", lambda: "sm90")
    monkeypatch.setattr(bench.gpu, "search_on_this_device", lambda case, **limits: found)
    monkeypatch.setattr(bench.gpu, "told", lambda record, device: f"{record['tile']} on {device}")
    lines = []
    records = run_everything(
        tmp_path / "out",
        [GQA],
        [Stand("base"), Stand("ours", side="ours")],
        minutes=5,
        device="cpu",
        test_command=(sys.executable, "-c", "print('1 passed')"),
        kernels=("forward",),
        say=lines.append,
    )
    assert records == read_records(tmp_path / "out" / RESULTS)
    failed = [r for r in records if r["kind"] == "job" and r["status"] != "done"]
    assert not failed
    kinds = [record["kind"] for record in records if record["kind"] != "job"]
    before = ["environment", "ceilings", "gather", "tests", "substituted_lse", *["planning"] * 4]
    assert kinds == [*before, "result", "result", "tune", "clocks"]
    assert sum("[64, 64, 4, 2] on " in line for line in lines) == 1
    assert all(r["gather_bytes_per_second"] > 0 for r in records if r["kind"] == "gather")
    plans = [record for record in records if record["kind"] == "planning"]
    assert all(min(plan["seconds"], plan["portable_seconds"]) > 0 for plan in plans)
    assert set(plans[0]["kernels"]) == {"lsh_codes", "segment_order"}
    assert (tmp_path / "out" / "ratio.png").exists()


def test_substituted_lse_is_honoured_by_the_cpu_op():
    (record,) = probe("cpu")
    assert record["honoured"] is True, record


def test_an_op_that_ignores_the_lse_is_found_out(monkeypatch):
    def ignorant(q, k, v):
        part = OPS["cpu"]["flash_for_cpu"](q, k, v)
        return Part(part.out, part.lse, lambda grad, o, s: part.backward(grad, part.out, part.lse))

    monkeypatch.setitem(OPS, "cpu", {"flash_for_cpu": OPS["cpu"]["flash_for_cpu"], "bad": ignorant})
    assert [record["honoured"] for record in probe("cpu")] == [True, False]


@pytest.mark.gpu
def test_gather_kernel():
    from bench.gather_kernel import gather_rows

    source = torch.randn(1000, 128, device="cuda").bfloat16()
    index = torch.randperm(1000, device="cuda").to(torch.int32)
    target = torch.empty_like(source)
    gather_rows(source, index, target)
    assert torch.equal(target, source[index.long()])


def test_a_dry_run_lists_every_stage_with_the_reason_it_is_skipped():
    workloads = select(device="cuda")
    listed = list_jobs(workloads, minutes=9, reason="there is no GPU", kernels=("forward",))
    names = [record["job"] for record in listed]
    assert names[:4] == ["environment", "ceilings", "gather bandwidth", "tests"]
    assert names[-2:] == ["tune forward", "clocks"] and {w.name for w in workloads} <= set(names)
    assert all(r["status"] == "skipped" and "there is no GPU" in r["reason"] for r in listed)
    fitting = sum(r["likely_seconds"] for r in listed if "would be left" not in r["reason"])
    assert 0 < fitting <= 9 * 60
