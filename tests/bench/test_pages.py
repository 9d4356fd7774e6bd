import json
from dataclasses import replace

import pytest

from bench.environment import ROOT, describe
from bench.pages import GOALS_TABLE, TABLE, filled
from bench.suites import SUITES
from tests.bench.test_report import result
from tests.bench.toys import CACHE, EMPTY_GROUP, GQA

QUOTING = [
    page
    for page in (ROOT / "docs").glob("*.md")
    if TABLE.search(page.read_text()) or GOALS_TABLE.search(page.read_text())
]


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: page.name)
def test_documentation_quotes_its_results(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text, f"run `python -m bench docs docs/{page.name}`"


def test_a_table_is_made_from_its_results(tmp_path):
    even = replace(CACHE, name="toy-even", suite="decode-maps", k_heads=3, v_heads=3)
    uneven = replace(EMPTY_GROUP, name="toy-uneven", suite="decode-maps", num_queries=1)
    speech = {"kind": "generate", "context": 99, "contender": "sdpa", "error": 0.01}
    speech |= {"side": "torch", "status": "timed"}
    records = [
        {"kind": "environment", **describe("cpu"), "device": "a processor"},
        {"kind": "ceilings", "read_bytes_per_second": 33e9},
        result(CACHE, "efficient_attn", "ours", 0.002),
        result(CACHE, "bmm-packed", "torch", 0.006),
        result(CACHE, "sdpa-flash-gqa", "torch", 0.02),
        result(CACHE, "read", "ceiling", 0.001),
        result(even, "efficient_attn", "ours", 0.0045),
        result(uneven, "efficient_attn", "ours", 0.004),
        result(even, "read", "ceiling", 0.0015),
        result(uneven, "read", "ceiling", 0.001),
        result(GQA, "efficient_attn", "ours", 1.0),
        result(GQA, "sdpa-flash-gqa", "torch", 1.0),
        speech | {"tokens_per_second": 7.5},
        speech | {"status": "wrong"},
    ]
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "results.jsonl").write_text(lines, encoding="utf-8")
    page = "before\n<!-- table: results.jsonl -->\nold\n<!-- end of table -->\nafter\n"
    new = filled(page, tmp_path)
    assert new.startswith("before\n") and new.endswith("after\n") and "old" not in new
    assert "a processor" in new and "33.0 GB/s" in new
    megabytes, gigabytes = CACHE.cache_bytes() / 1e6, CACHE.cache_bytes() / 0.002 / 1e9
    row = (
        f"| {megabytes:.1f} | 2.00 | {gigabytes:.1f} | 50% | bmm-packed | 6.00 | **3.00** | 10.0 |"
    )
    assert f"| `{CACHE.name}` {row}" in new
    assert f"| `{GQA.name}` | 1000.0 |" in new and "| sdpa-flash-gqa | 1000.0 | **1.00** |" in new
    assert "| `toy-uneven` | `toy-even` | 1.50 | 25% | 33% | 1.12 |" in new
    assert "| 99 | sdpa | 7.50 | 1.00 | 1.0e-02 |" in new
    assert "| 99 | sdpa |  |  | 1.0e-02 |" in new
    assert filled(new, tmp_path) == new


def test_estimates_have_a_table_of_their_own(tmp_path):
    workload = next(w for w in SUITES["hyper"] if w.num_keys == 32768)
    records = [
        {"kind": "environment", **describe("cpu")},
        result(workload, "efficient_attn", "ours", 0.07),
        result(workload, "sdpa-flash", "torch", 3.5),
    ]
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (tmp_path / "results.jsonl").write_text(lines, encoding="utf-8")
    page = filled("<!-- table: results.jsonl -->\n<!-- end of table -->", tmp_path)
    rows = [line for line in page.splitlines() if workload.name in line]
    assert len(rows) == 1 and "| 70.0 | sdpa-flash | 3500 | **50.0** |" in rows[0]
    assert rows[0].endswith("| 1.50 |")
