"""Each rule is measured on the model as it was, and tables say what the records do."""

import pytest

pytest.importorskip("transformers")

from bench.diffqkv import MERGES, measure
from bench.diffqkv_report import diffqkv_figure, diffqkv_rows
from bench.pages import markdown

ENVIRONMENT = {"kind": "environment", "device": "d", "threads": 2, "torch": "2", "commit": "c"}


def test_every_rule_is_measured(one_thread):
    records = []
    measure(records.append, counts=[(1, 1)], length=48, rows=2, calibration_rows=2)
    source, *rest = records
    assert abs(source["change"]) < 1e-9
    assert [(r["merge"], r["calibrated"]) for r in rest] == [
        (merge, calibrated) for merge in MERGES for calibrated in (True, False)
    ]
    assert len({round(r["change"], 6) for r in rest}) == 6
    assert all(r["bytes_per_token"] == {"before": 3072, "after": 1536} for r in rest)
    page = markdown([ENVIRONMENT, *records])
    assert f"perplexity {source['perplexity']:.2f} before conversion" in page
    assert page.count("| 1 | 1 | 1,536 |") == 6


def test_runs_are_told_with_their_spread():
    run = {"kind": "trained", "steps": 250, "tokens": 512000, "parameters": 1315968}
    records = [
        run | {"variant": name, "seed": seed, "cache_numbers_per_token": cache, "test_loss": loss}
        for name, cache, losses in (
            ("MHA 8/8/8", 1024, (4.75, 4.71)),
            ("DiffQKV 8/1/4", 320, (4.7, 4.68)),
        )
        for seed, loss in enumerate(losses)
    ]
    short = records[0] | {"steps": 10, "test_loss": 9.0}
    ((heading, rows),) = diffqkv_rows([short, *records])
    assert "512,000 tokens" in heading
    assert rows[1:] == [
        ("MHA 8/8/8", "1024", "1,315,968", "2", "4.730", "4.710", "4.750"),
        ("DiffQKV 8/1/4", "320", "1,315,968", "2", "4.690", "4.680", "4.700"),
    ]
    points = [line.get_xydata().tolist() for line in diffqkv_figure(records).axes[0].lines]
    assert points == [[[1024, 4.75], [1024, 4.71]], [[320, 4.7], [320, 4.68]]]
    assert diffqkv_figure([]) is None and diffqkv_rows([]) == []
