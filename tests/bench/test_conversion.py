"""The benchmark of conversion measures what it says, on few rows of text."""

import pytest

pytest.importorskip("transformers")

from bench.conversion import LADDER, LEVERS, Specimen, measure
from bench.conversion_report import conversion_figure, conversion_rows
from efficient_attn.convert.mla import CompressOptions


@pytest.fixture(scope="module")
def specimen():
    return Specimen(rows=4, length=64, calibration_rows=16)


def test_the_whole_cache_loses_nothing(specimen):
    options = CompressOptions()
    chosen = specimen.rope_dim(specimen.numbers, options)
    made, error = specimen.convert(specimen.numbers, chosen, options)
    result = specimen.judge(made, specimen.texts["held out"])
    assert abs(result["change"]) < 1e-5
    assert abs(error) < 1e-6


def test_text_is_judged_by_that_no_choice_saw(specimen):
    rows = [{tuple(row.tolist()) for row in text.ids} for text in specimen.texts.values()]
    assert len(rows) == 2 and not rows[0] & rows[1]


@pytest.mark.parametrize("numbers", [64, 32, 16])
def test_the_default_loses_less_than_the_published_choice(specimen, numbers):
    options = CompressOptions()
    text = specimen.texts["held out"]
    made, _ = specimen.convert(numbers, specimen.rope_dim(numbers, options), options)
    ours = specimen.judge(made, text)["change"]
    rope_dim = {64: 32, 32: 16, 16: 8}[numbers]
    options = CompressOptions.paper(fold=32 // rope_dim)
    theirs = specimen.judge(specimen.convert(numbers, rope_dim, options)[0], text)["change"]
    assert ours < 0.7 * theirs


def test_records_fill_the_tables_and_the_figure(monkeypatch):
    for name, every in (("LEVERS", LEVERS), ("LADDER", LADDER)):
        monkeypatch.setattr(f"bench.conversion.{name}", dict(list(every.items())[:1]))
    records = [{"kind": "environment"}]
    measure(records.append, budgets=(16,), rows=2, length=32, calibration_rows=4)
    budgets, levers = conversion_rows(records)
    assert [row[0] for row in budgets[1][1:]] == ["16"]
    assert len(levers[1]) == 5  # and sizes for each layer
    assert all(cell for row in (*budgets[1], *levers[1]) for cell in row)
    assert len(conversion_figure(records).axes) == 1
    assert conversion_rows(records[:1]) == [] and conversion_figure(records[:1]) is None
