"""The replay of the Sigma paper checks before it times, and leaves its caches as long as before."""

import pytest
import torch

from bench import replay, replay_steps
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


class Counter:
    """A clock that tells how often it was asked."""

    round_seconds = 0.0

    def __init__(self):
        self.samples = 0

    def sample(self, step, repeats):
        step()
        self.samples += 1
        return float(self.samples)


def test_layers_are_timed_in_both_modes_and_with_the_attention_of_torch(small, one_thread):
    records = []
    replay_steps.time_steps(9, torch.float64, "cpu", Counter(), records.append, seconds=0.0)
    assert len(records) == len(replay.ARMS) * 3 * 2
    for record in records:
        assert record["status"] == "timed" and record["error"] < record["error_limit"]
    heads, *rows = replay_steps.step_rows(records)
    assert [row[:3] for row in rows] == [
        (mode, "9", arm.name) for mode in ("prefill", "training step") for arm in replay.ARMS
    ]
    assert [row[-1] for row in rows if row[2] == replay.BASELINE] == ["1.00", "1.00"]


def test_a_layer_that_errs_is_not_timed(small, one_thread, monkeypatch):
    monkeypatch.setattr(replay_steps, "_shared", lambda query, key, value: query * 0)
    records = []
    replay_steps.time_steps(5, torch.float32, "cpu", Counter(), records.append, seconds=0.0)
    wrong = [r for r in records if r["status"] == "wrong"]
    assert {r["contender"] for r in wrong} == {"enable_gqa"} and len(wrong) == 6
    assert not any("seconds" in r for r in wrong)
    assert all(row[4] == "copied heads" for row in replay_steps.step_rows(records)[1:])
