import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from bench.compare import changes, differences_of_environment
from bench.environment import describe, without_paths
from bench.measure import CpuClock
from bench.plot import draw
from bench.report import (
    NOT_MEASURED,
    ResultsFile,
    print_summary,
    ratios,
    read_records,
    share_of_peak,
)
from bench.runner import run_workload
from bench.workloads import Workload
from tests.bench.toys import CACHE, GQA, SEVERAL, UNEVEN, Stand


def result(workload: Workload, provider: str, side: str, seconds: float, spread: float = 0.01):
    return {
        "kind": "result",
        "workload": workload.as_record(),
        "provider": provider,
        "side": side,
        "status": "timed",
        "reasons": [],
        "seconds": {
            "median": seconds,
            "low": seconds * (1 - spread),
            "high": seconds * (1 + spread),
            "rounds": 5,
            "repeats": 1,
        },
        "flops_per_second": workload.flops() / seconds,
        "bytes_per_second": workload.minimal_bytes() / seconds,
        "memory": {"peak_bytes": 5e6, "result_bytes": 2e6, "workspace_in_expanded_keys": 0.5},
    }


def example(ours: float = 1.0, spread: float = 0.01):
    longer = GQA.__class__(**{**vars(GQA), "name": "toy-gqa-66", "num_keys": 66})
    refused = result(GQA, "impossible", "torch", 0.0001) | {"status": "refused"}
    return [
        {"kind": "environment", **describe("cpu")},
        {"kind": "ceilings", "matmul_flops_per_second": {"float32": 1e9}},
        result(GQA, "efficient_attn", "ours", ours, spread),
        result(GQA, "sdpa-flash", "torch", 2.0, spread),
        result(GQA, "sdpa-math", "torch", 9.0, spread),
        result(GQA, "eager", "yardstick", 0.001, spread),
        refused,
        result(longer, "efficient_attn", "ours", 4.0, spread),
        result(longer, "sdpa-math", "torch", 3.0, spread),
        result(UNEVEN, "efficient_attn", "ours", 4.0, spread),
    ]


def test_ratio_is_to_the_fastest_timed_torch_provider():
    found = {ratio.workload: ratio for ratio in ratios(example())}
    assert set(found) == {"toy-gqa-33", "toy-gqa-66"}, "without a torch time there is no ratio"
    best = found["toy-gqa-33"]
    assert (best.baseline, best.value) == ("sdpa-flash", 2.0)
    assert best.low == pytest.approx(2 * 0.99 / 1.01) and best.high == pytest.approx(
        2 * 1.01 / 0.99
    )
    assert found["toy-gqa-66"].value == 0.75


def test_records_survive_the_file(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    with ResultsFile(path) as results:
        run_workload(
            GQA,
            [Stand("a"), Stand("b", fault="nan")],
            "cpu",
            CpuClock(),
            results.write,
            seconds=0.0,
        )
        results.write({"kind": "environment", **describe("cpu")})
    records = read_records(path)
    assert [record["kind"] for record in records] == ["result", "result", "environment"]
    again = tmp_path / "again.jsonl"
    with ResultsFile(again) as results:
        for record in records:
            results.write(record)
    assert again.read_text() == path.read_text()


def test_a_line_cut_off_at_the_end_is_left_out(tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"kind": "a"}\n{"kind": "b"}\n{"ki')
    assert [record["kind"] for record in read_records(path)] == ["a", "b"]
    path.write_text('{"kind": "a"}\n{"ki\n{"kind": "b"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)


def test_records_name_no_place(tmp_path):
    environment = json.dumps(describe("cpu"))
    assert not re.search(r'"/\w|\\\\|/home|/root|/tmp', environment)
    assert without_paths("at /a/b-1/c.py:3 and a/b") == "at c.py:3 and a/b"


def test_summary_says_what_was_not_measured():
    console = Console(record=True, width=200, file=io.StringIO())
    wrong = result(UNEVEN, "other", "torch", 1.0) | {"status": "wrong", "reasons": ["out is off"]}
    print_summary([*example(), wrong], console)
    text = console.export_text()
    assert re.search(r"toy-gqa-33.*sdpa-flash.*2\.00", text)
    assert re.search(rf"toy-uneven-33.*{NOT_MEASURED}", text)
    assert "out is off" in text


def test_figures_are_written(tmp_path):
    written = draw(example(), tmp_path / "figures")
    assert [path.name for path in written] == ["ratio.png", "time.png", "memory.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert draw([example()[0]], tmp_path / "nothing") == []


def test_compare_flags_a_regression_and_not_noise():
    def verdicts(before, after):
        return {change.after.workload: change.verdict for change in changes(before, after)}

    assert verdicts(example(1.0), example(1.0)) == {"toy-gqa-33": "same", "toy-gqa-66": "same"}
    assert verdicts(example(1.0), example(1.3))["toy-gqa-33"] == "slower"
    assert verdicts(example(1.3), example(1.0))["toy-gqa-33"] == "faster"
    assert verdicts(example(1.0, 0.2), example(1.3, 0.2))["toy-gqa-33"] == "same", "it is noise"
    assert verdicts(example(1.0, 0.0), example(1.04, 0.0))["toy-gqa-33"] == "same", "it is tiny"


def test_compare_takes_a_baseline_known_to_both():
    before, after = example(), example()
    faster = result(GQA, "new in torch", "torch", 0.1)
    change = changes(before, [*after, faster])[0]
    assert change.after.baseline == "sdpa-flash" and change.verdict == "same"


def test_another_machine_is_told():
    before, after = example(), example()
    after[0]["device"] = "another"
    assert differences_of_environment(before, before) == []
    assert "another" in differences_of_environment(before, after)[0]


def test_a_cache_is_held_against_reading_it():
    ours = result(CACHE, "efficient_attn", "ours", 2.0)
    copying = {"kind": "ceilings", "copy_bytes_per_second": 4 * ours["bytes_per_second"]}
    assert share_of_peak(ours, [copying, ours]) == 0.25
    read = result(CACHE, "read", "ceiling", 1.0)
    other = result(SEVERAL, "read", "ceiling", 0.1)
    assert share_of_peak(ours, [copying, other, ours, read]) == 0.5
    assert share_of_peak(ours, [ours]) is None


def test_bandwidth_is_drawn_over_the_length_of_the_cache(tmp_path):
    longer = replace(CACHE, name="toy-cache-66", num_keys=66)
    records = [
        result(workload, name, side, seconds)
        for workload in (CACHE, longer)
        for name, side, seconds in (("efficient_attn", "ours", 1.0), ("read", "ceiling", 0.5))
    ]
    assert [path.name for path in draw(records, tmp_path)] == ["bandwidth.png"]
