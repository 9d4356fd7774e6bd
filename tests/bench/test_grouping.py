"""Every rule is measured, and tables and figure say what the records do."""

import pytest
import torch

pytest.importorskip("transformers")

from bench.grouping import measure, variants
from bench.grouping_report import grouping_figure
from bench.pages import markdown
from bench.quality_tasks import Encoder, LanguageModel

ENVIRONMENT = {"kind": "environment", "device": "d", "threads": 2, "torch": "2", "commit": "c"}


@pytest.fixture(autouse=True)
def small(one_thread):
    """The models are."""


@pytest.fixture(scope="module")
def records():
    found = []
    measure(found.append, models=[LanguageModel], length=48, rows=2, calibration_rows=2)
    return found


def test_each_variant_is_measured_once_and_on_the_model_as_it_was(records):
    source, *rest = records
    assert len(rest) == len(list(variants((1,)))) == 9
    assert abs(source["change"]) < 1e-9 and all(r["change"] != 0 for r in rest)
    assert len({(r["pooling"], r["calibrated"]) for r in rest}) == 9
    assert all(0 < r["value_error"] < 2 and r["largest_group"] == 2 for r in rest)


@pytest.mark.parametrize("make", [Encoder, LanguageModel])
def test_text_for_calibration_is_other_text(make):
    task = make(48, 4)
    other = task.other_text(4)
    assert other.shape == task.text.shape
    if make is Encoder:
        assert torch.equal(other[:, [0, -1]], task.text[:, [0, -1]])
    assert not {tuple(row[1:9].tolist()) for row in other} & {
        tuple(row[1:9].tolist()) for row in task.text
    }
    if make is Encoder:
        with pytest.raises(ValueError, match="not so much text"):
            task.other_text(10**6)


def test_tables_and_figure():
    start = {"kind": "grouping", "model": "m", "of_heads": 12, "tokens": 128, "heads": 12,
             "partition": "", "pooling": "", "calibrated": False, "pooled_cosine": 1.0}  # fmt: skip
    records = [ENVIRONMENT, start]
    for heads, value in ((6, 0.9), (3, 0.8)):
        for pooling, less in (("mean", 0.2), ("svd", 0.0)):
            rule = {"partition": "consecutive", "pooling": pooling, "calibrated": True}
            records.append({**start, **rule, "heads": heads, "pooled_cosine": value - less})
    trained = {"kind": "uptrained", "model": "l", "pooling": "mean", "heads": 1, "of_heads": 2,
               "distill": 0.0, "trained_tokens": 65536, "perplexity_before": 98.7,
               "perplexity_after": 70.25}  # fmt: skip
    page = markdown([*records, trained])
    assert "cosine to the source by heads left of 12 (source: 1.000)" in page
    assert "| consecutive | svd | yes | **0.900** | **0.800** |" in page
    assert "| consecutive | mean | yes | 0.700 | 0.600 |" in page
    assert "| 1 | mean | 0 | 65,536 | 98.70 | 70.25 |" in page
    assert len(grouping_figure(records).axes) == 1
    assert grouping_figure([ENVIRONMENT]) is None
