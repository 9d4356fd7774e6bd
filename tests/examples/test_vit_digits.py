"""The example with digits trains what it says."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

pytest.importorskip("sklearn")

import train_vit_digits as example  # noqa: E402


@pytest.mark.parametrize("way", example.WAYS)
def test_every_way_learns(way, one_thread):
    model = example.train(way, 4, seed=0, epochs=3)
    assert not model.training
    assert example.accuracy(model, seed=0) > 0.2  # a tenth would be chance


def test_the_seed_fixes_everything(one_thread):
    one, two = (example.train("even groups", 2, seed=1, epochs=1) for _ in range(2))
    assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_half_of_the_images_are_held_back():
    learnt, held_back = example.split(0)
    together = torch.cat([learnt, held_back])
    assert torch.equal(together.sort().values, torch.arange(len(example.digits()[0])))
    assert abs(len(learnt) - len(held_back)) <= 1


class InThisProcess(ThreadPoolExecutor):
    def __init__(self, workers, *process_options):
        super().__init__(workers)


def test_runs_are_added_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(example, "RUNS", [("even groups", 4), ("DGQA, average", 4)])
    monkeypatch.setattr(example, "train", lambda way, n, seed: example.VisionTransformer(way, n))
    out = tmp_path / "runs.jsonl"
    example.run(out, seeds=1, minutes=0.0, workers=1)
    assert example.read(out) == []  # too late to begin
    example.run(out, seeds=1, minutes=1.0, workers=1)
    first = example.read(out)
    example.run(out, seeds=2, minutes=1.0, workers=1)
    runs = example.read(out)
    assert runs[:2] == first and [r["seed"] for r in runs] == [0, 0, 1, 1]
    assert runs[1]["groups"] == [[2, 2, 2, 2]] * example.LAYERS
    heads, even, dynamic = example.table(runs)
    assert even[1] == "even groups" and dynamic[1] == "DGQA, average" and dynamic[-1] == "2"
    example.draw([runs], tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 1000
