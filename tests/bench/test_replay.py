"""The replay of the Sigma paper checks before it times, and leaves its caches as long as before."""

import pytest
import torch

from bench import replay
from bench.pages import markdown


@pytest.fixture
def small(monkeypatch):
    for name, size in {"LAYERS": 2, "EMBED": 32, "HEADS": 32, "DIM": 8}.items():
        monkeypatch.setattr(replay, name, size)


def test_every_arm_is_checked_and_timed(small):
    records = []
    replay.replay(9, torch.float32, "cpu", records.append, tokens=2)
    assert [record["arm"] for record in records] == [arm.name for arm in replay.ARMS]
    for record in records:
        assert record["status"] == "timed" and record["error"] < record["error_limit"] < 0.1
        augmented = record["seconds_per_token"]["augmented query"] > 0
        assert augmented == ("augmented" in record["arm"])
    sizes = [record["cache_bytes_per_token"] for record in records]
    assert sizes == [2 * heads * 8 * 4 for heads in (32, 20, 20)]
    environment = {
        "kind": "environment",
        "device": "a CPU",
        "threads": 1,
        "torch": "2",
        "commit": "c",
    }
    page = markdown([environment, *records])
    assert page.count("| GQA 32/16/16 | ") == 1 and "| 1.00 |" in page


def test_wrong_attention_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(replay, "_by_ours", lambda query, cache: query * 0)
    records = []
    replay.replay(9, torch.float32, "cpu", records.append, tokens=1)
    assert [r["status"] for r in records] == ["wrong"] * 3
    assert "seconds_per_token" not in records[0]


def test_a_round_ends_where_it_began(small):
    run = replay.Run(replay.ARMS[1], 9, 3, torch.float32, "cpu")
    run.decode(3)
    assert [cache.longest for cache in run.caches] == [9, 9]
