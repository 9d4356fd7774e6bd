"""Goals name workloads that exist, and are filled from records alone."""

from dataclasses import replace

import pytest

from bench import goals
from bench.environment import describe
from bench.suites import select
from tests.bench.test_report import result
from tests.bench.toys import CACHE, GQA

NAMES = {workload.name for workload in select()}


@pytest.mark.parametrize("goal", goals.GOALS, ids=lambda goal: goal.what)
def test_every_goal_is_decided_by_workloads_of_the_suites(goal):
    assert goal.workloads
    for workload in goal.workloads:
        assert set([workload] if isinstance(workload, str) else workload) <= NAMES


def test_nothing_measured_is_said_to_be_so():
    heads, *rows = goals.goal_rows([])
    column = heads.index("measured")
    assert {row[column] for row in rows} == {goals.NOT_YET}


def test_figures_are_read_off_the_latest_file():
    wide = replace(CACHE, name="wide")
    environment = {"kind": "environment", **describe("cpu")}
    older = [environment, result(GQA, "efficient_attn", "ours", 2.0)]
    newer = [
        environment,
        {"kind": "ceilings"},
        result(GQA, "efficient_attn", "ours", 1.0),
        result(GQA, "sdpa-flash-gqa", "torch", 1.5),
        result(CACHE, "efficient_attn", "ours", 0.002),
        result(CACHE, "read", "ceiling", 0.001),
        result(CACHE, "efficient_attn-exact", "yardstick", 0.005),
        result(wide, "efficient_attn", "ours", 0.003),
    ]
    files = [older, newer]
    assert goals.FIGURES["ratio"](GQA.name, files) == "1.5x"
    assert goals.FIGURES["ratio"](CACHE.name, files) == ""
    assert goals.FIGURES["share"](CACHE.name, files) == "50 %"
    assert goals.FIGURES["microseconds"](CACHE.name, files) == "2000 us"
    assert goals.FIGURES["beside"]((CACHE.name, "wide"), files) == "1.50x"
    assert goals.FIGURES["over_exact"](CACHE.name, files) == "2.50x"
    assert goals.FIGURES["over_exact"]("wide", files) == ""
    assert goals.FIGURES["teraflops"]("nowhere", files) == ""
