"""Arrangements of heads, equally large; what a run writes and does not repeat."""

import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

transformers = pytest.importorskip("transformers")

import train_diffqkv  # noqa: E402
from train_diffqkv import HEADS, LAYERS, VARIANTS, WIDTH, app, build, cache_numbers  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_all_are_equally_large_and_cache_what_their_heads_say():
    models = {name: build(name, 4096, seed=0) for name in VARIANTS}
    sizes = [model.num_parameters() for model in models.values()]
    assert max(sizes) - min(sizes) < 1e-3 * min(sizes)
    for name, model in models.items():
        options, dim = VARIANTS[name], WIDTH // HEADS
        keys = options["num_key_heads"] * options.get("head_dim", dim)
        assert cache_numbers(model) == LAYERS * (keys + options["num_value_heads"] * dim)


def test_runs_are_added_to_a_file_and_not_repeated(tmp_path, monkeypatch):
    two = {name: VARIANTS[name] for name in ("MHA 8/8/8", "DiffQKV 8/1/4, augmented query")}
    monkeypatch.setattr(train_diffqkv, "VARIANTS", two)
    monkeypatch.setattr(train_diffqkv, "LENGTH", 32)
    monkeypatch.setattr(train_diffqkv, "mean_loss", lambda model, tokens, length: 8.0)
    batches = torch.randint(4096, (4, 32))
    monkeypatch.setattr(train_diffqkv, "batch_at", lambda stream, step, length: batches)
    monkeypatch.setattr(train_diffqkv, "token_stream", lambda tokenizer, split: batches.flatten())
    out = tmp_path / "runs.jsonl"
    out.write_text('{"kind": "environment"}\n')
    arguments = ["run", "--steps", "2", "--seeds", "2", "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    _, *runs = map(json.loads, out.read_text().splitlines())
    assert [(r["variant"], r["seed"]) for r in runs] == [(n, s) for s in (0, 1) for n in two]
    assert all(r["kind"] == "trained" and r["tokens"] == 256 for r in runs)
    before = out.read_text()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert out.read_text() == before
