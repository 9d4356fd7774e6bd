"""The benchmark of recovery training converts, trains and tells, on little text and few steps."""

import itertools
import json

import pytest

pytest.importorskip("transformers")

from bench import recovery
from bench.recovery import measure
from bench.recovery_report import recovery_figure, recovery_rows
from efficient_attn.cli import _compressing
from examples.recover_mla import Recipe


@pytest.fixture
def records(one_thread, monkeypatch):
    files = recovery._files
    monkeypatch.setattr(recovery, "_files", lambda *which: itertools.islice(files(*which), 3))
    found = [{"kind": "environment"}]
    recipe = Recipe(steps=3, batch=2, length=128, rate=1e-3)
    measure(found.append, recipe=recipe, ratios=(1.0, 0.25), tokens=1024)
    return found


def test_the_source_and_its_conversion_are_measured_before_and_after(records, tmp_path):
    _, source, converted = records
    # 6 layers, 2 key and 2 value heads, 32 wide, 4 bytes.
    assert (source["bytes_per_token"], converted["bytes_per_token"]) == (3072, 768)
    assert source["perplexity_before"] < converted["perplexity_after"]
    assert converted["perplexity_after"] != converted["perplexity_before"]
    assert converted["trained_tokens"] == 3 * 2 * 128 and converted["minutes"] > 0

    ((_, rows),) = recovery_rows(records)
    assert [row[0] for row in rows[1:]] == ["3,072", "768"]
    assert len(recovery_figure(records).axes) == 1
    assert recovery_rows(records[:1]) == [] and recovery_figure(records[:1]) is None

    assert _compressing.trained_before(tmp_path / "none.jsonl") == []
    path = tmp_path / "recovery.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    (trained,) = _compressing.trained_before(path)
    assert trained.perplexity == converted["perplexity_after"]
