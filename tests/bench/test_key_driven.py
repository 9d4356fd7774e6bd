import io

import pytest
from rich.console import Console

from bench import key_driven
from bench.key_driven import ALLOCATIONS, Shape, layer_rows, print_layers, time_layers
from bench.measure import CpuClock

TINY = [
    Shape("tiny", 2, 6, 24, 6, (0, 4, 2), causal=False),
    Shape("tiny and causal", 1, 5, 24, 6, (3, 1, 2), causal=True),
]


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_everybody_computes_the_same_and_is_timed(shape):
    records = []
    time_layers(shape, "cpu", CpuClock(), records.append, seconds=0.01)
    assert all(record["status"] == "timed" for record in records)
    names = {record["contender"] for record in records}
    assert names == {*key_driven.contenders(shape, "cpu"), *ALLOCATIONS}
    errors = {record["contender"] for record in records if record["error"] is not None}
    assert errors == {"efficient_attn, uneven", "torch, heads gathered", "loop over groups"}
    assert all(record["error"] < 1e-5 for record in records if record["error"] is not None)
    rows = layer_rows(records)
    assert len(rows) == len(records) == 4 * 5 + 2 + 2
    console = Console(record=True, width=200, file=io.StringIO())
    print_layers(records, console)
    assert "loop over groups" in console.export_text()


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(key_driven, "_looped", lambda *options: lambda q, k, v: 2 * q)
    records = []
    time_layers(TINY[0], "cpu", CpuClock(), records.append, seconds=0.01)
    wrong = [record for record in records if record["status"] == "wrong"]
    assert [record["contender"] for record in wrong] == ["loop over groups"]
    assert "loop over groups" not in {row[3] for row in layer_rows(records)}
