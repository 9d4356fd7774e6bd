"""Rooflines: what is a point, and under which roofs it stands."""

import re
from dataclasses import replace

import pytest

from bench.environment import ROOT
from bench.pages import draw_figures, filled
from bench.report import read_records
from bench.roofline import by_kind, draw_rooflines, panels, roofline_figure
from tests.bench.test_report import result
from tests.bench.toys import BOTH, CACHE, GQA, HALF_CACHE

HYPER = replace(GQA, name="toy-hyper", op="hyper", hyper="paper")
SELECTED = replace(CACHE, name="toy-selected", top_values=3)
CEILINGS = {
    "kind": "ceilings",
    "read_bytes_per_second": 3e9,
    "copy_bytes_per_second": 2e9,
    "matmul_flops_per_second": {"float32": 1e11},
}


def environment(kind="cpu"):
    return {
        "kind": "environment",
        "device": "a device",
        "device_kind": kind,
        "torch": "2",
        "commit": "c",
    }


def run(kind="cpu", ceilings=CEILINGS):
    pairs = [
        each
        for workload in (GQA, BOTH, CACHE, HALF_CACHE, HYPER, SELECTED)
        for each in (
            result(workload, "efficient_attn", "ours", 0.1),
            result(workload, "sdpa-flash", "torch", 0.2),
            result(workload, "sdpa-math", "torch", 0.3),
        )
    ]
    seen = result(CACHE, "read", "ceiling", 0.05) | {"bytes_per_second": 5e9}
    return [environment(kind), ceilings, *pairs, seen]


def test_points_are_ours_and_the_fastest_of_torch_that_do_all_they_are_counted_with():
    (panel,) = panels(run())
    assert (panel.dtype, panel.read, panel.copy, panel.matmul) == ("float32", 5e9, 2e9, 1e11)
    assert [(p.what, p.ours) for p in panel.points] == [
        (what, ours) for what in ("forward", "forward and backward", "cache") for ours in (1, 0)
    ]
    first = panel.points[0]
    assert first.intensity == pytest.approx(GQA.flops() / GQA.minimal_bytes())
    assert first.flops_per_second == pytest.approx(GQA.flops() / 0.1)
    assert panel.points[1].flops_per_second == pytest.approx(GQA.flops() / 0.2)


def test_without_ceilings_or_results_nothing_is_drawn():
    assert panels([environment()]) == []
    assert panels(run(ceilings={"kind": "ceilings"})) == []
    assert roofline_figure([[environment()]]) is None


def test_one_figure_for_each_kind_of_device(tmp_path):
    files = [run(), run(), run("cuda")]
    assert {kind: len(of_kind) for kind, of_kind in by_kind(files).items()} == {"cpu": 2, "cuda": 1}
    drawn = draw_rooflines(files, tmp_path)
    assert [path.name for path in drawn] == ["roofline-cpu.png", "roofline-cuda.png"]
    assert [path.name for path in draw_rooflines(files[:1], tmp_path / "one")] == drawn[
        0
    ].name.split()


def test_a_page_of_goals_links_what_is_drawn_for_it(tmp_path):
    page = tmp_path / "docs" / "goals.md"
    page.parent.mkdir()
    page.write_text("<!-- goals -->\nold\n<!-- end of goals -->\n")
    text = filled(page.read_text(), tmp_path)
    assert "CPU: no roofline" in text and "GPU: no roofline" in text
    assert filled(text, tmp_path) == text and draw_figures(page, tmp_path) == []
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "a.jsonl").write_text((ROOT / "bench/results/attention-cpu.jsonl").read_text())
    assert read_records(results / "a.jsonl")
    assert "(goals/roofline-cpu.png)" in filled(text, tmp_path)
    (drawn,) = draw_figures(page, tmp_path)
    assert drawn == page.parent / "goals" / "roofline-cpu.png" and drawn.stat().st_size > 10000


def test_figures_that_pages_show_are_there():
    for page in (ROOT / "docs").glob("*.md"):
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} shows {link}"
