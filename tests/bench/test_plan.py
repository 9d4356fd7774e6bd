"""Predictions of the planner beside measured times, by hand."""

import pytest

from bench.pages import markdown
from bench.plan_report import plan_rows
from bench.suites import SUITES
from efficient_attn import costs
from tests.bench.test_report import result

ENVIRONMENT = {"kind": "environment", "device": "d", "threads": 2, "torch": "2", "commit": "c"}
CPU = [w for w in SUITES["plan"] if w.device == "cpu" and not w.quick]


def records(workloads=CPU, seconds=0.01, reading=0.005):
    ceilings = {"kind": "ceilings", "matmul_flops_per_second": {"float32": 2e11, "bfloat16": 4e11}}
    found = [ENVIRONMENT, ceilings]
    for workload in workloads:
        found.append(result(workload, "efficient_attn", "ours", seconds))
        found.append(result(workload, "read", "ceiling", reading))
    return found


def test_every_row_of_the_planner_is_measured():
    tables = dict(plan_rows(records()))
    assert len(tables) == 2
    for rows in tables.values():
        names = [row[0].split(",")[0] for row in rows[1:]]
        assert names == ["MHA 32", "GQA 32/16", "GQA 32/8", "MQA 32/1", "MLA 512+64",
                         "DiffQKV 32/4/16", "DiffQKV 32/2/8"]  # fmt: skip


def test_predictions_are_those_of_the_planner():
    (_, rows), *_ = plan_rows(records())
    by_name = {row[0].split(",")[0]: row for row in rows[1:]}
    # 16,384 tokens, 2 bytes, all of it read in 5 ms; 32 heads of 128 ask for few operations.
    _, read, by_bytes, predicted, measured, ratio, _, faster = by_name["DiffQKV 32/4/16"]
    assert float(read) == pytest.approx(16384 * 20 * 128 * 2 / 1e6, abs=0.05)
    assert (by_bytes, predicted, measured, ratio) == ("5.00", "5.00", "10.00", "2.00")
    assert faster == "1.0"
    # Latent attention asks for 2 * 32 * (576 + 512) of each token, 4e11 in a second.
    latent = by_name["MLA 512+64"]
    flops = 2 * 32 * (576 + 512) * 16384
    assert float(latent[3]) == pytest.approx(max(5.0, flops / 4e11 * 1e3), abs=0.005)
    variant = costs.latent_variant("", 0, 32, kv_lora_rank=512, qk_rope_head_dim=64,
                                   qk_nope_head_dim=0, v_head_dim=0)  # fmt: skip
    assert variant.flops * 16384 == flops


def test_arithmetic_decides_where_bytes_are_few():
    (_, rows), *_ = plan_rows(records(reading=1e-5))
    latent = next(row for row in rows if row[0].startswith("MLA"))
    assert float(latent[3]) > float(latent[2]) == 0.01


def test_a_page_holds_the_table_and_what_lacks_a_ceiling_is_left_out():
    page = markdown(records())
    assert "Prediction and measurement of one layer's attention, bfloat16" in page
    without = [r for r in records() if r["kind"] != "ceilings"]
    assert not plan_rows(without) and not plan_rows(records(CPU[:1]))
