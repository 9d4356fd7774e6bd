"""A few steps of further training: what they improve, log and fix."""

import copy
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

transformers = pytest.importorskip("transformers")

pytest.importorskip("sklearn")

import uptrain as example  # noqa: E402
from train_language_model import MODEL_FOLDER, train_step, worker_pool  # noqa: E402
from typer.testing import CliRunner  # noqa: E402
from uptrain import app, distilled, optimizers_of  # noqa: E402
from uptraining import group_sizes, uptrain  # noqa: E402

from efficient_attn.convert.gqa.learned import fold_averages  # noqa: E402
from efficient_attn.integrations.grouping import group_heads  # noqa: E402
from efficient_attn.layers import KDGQA  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)


def updates(model, optimizers, loss_of=None):
    def update(batch, progress):
        with worker_pool() as pool:
            return train_step(model, optimizers, batch, 1e-3 * (1 - progress), pool, loss_of)

    return update


def batches():
    torch.manual_seed(0)
    batch = torch.randint(3, 4000, (2, 24))
    while True:
        yield batch


def test_training_lowers_the_loss_and_its_parts_are_those_of_the_source(source):
    model = copy.deepcopy(source)
    group_heads(model, 1, pooling="learned")
    averages = [p for n, p in model.named_parameters() if n.endswith("weight.0.weight")]
    before = [p.clone() for p in averages]
    log = uptrain(model, batches(), 6, update=updates(model, optimizers_of(model)), log_every=3)
    assert [entry["step"] for entry in log] == [3, 6] and log[-1]["seen"] == 6 * 48
    assert log[-1]["train_loss"] < log[0]["train_loss"] - 0.1
    assert all(not torch.equal(a, b) for a, b in zip(averages, before, strict=True))
    assert fold_averages(model) == 12
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (32, 256)


def test_a_teacher_pulls_towards_itself(source):
    model, row = copy.deepcopy(source), next(batches())[0]
    assert distilled(source, source, 1.0)(row).item() == pytest.approx(0, abs=1e-5)
    group_heads(model, 1, pooling="first")
    loss = distilled(model, source, 1.0)
    before = loss(row).item()
    uptrain(model, batches(), 4, update=updates(model, optimizers_of(model), loss))
    assert loss(row).item() < before


class KeyDriven(nn.Module):
    """One layer whose groups follow its keys, with the outputs of a language model."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4000, 16)
        self.attention = KDGQA(16, 4, num_kv_heads=2)
        self.head = nn.Linear(16, 4000)

    def forward(self, ids, labels, use_cache):
        logits = self.head(self.attention(self.embedding(ids)))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return type("Out", (), {"loss": loss})


def test_groups_that_follow_their_keys_are_logged_and_frozen():
    model = KeyDriven()
    optimizers = [torch.optim.SGD(model.parameters())]
    log = uptrain(model, batches(), 4, update=updates(model, optimizers), log_every=1)
    assert model.attention.is_frozen
    assert sum(log[-1]["groups"]["attention"]) == 4
    assert log[-1]["groups"] == group_sizes(model)
    assert all(entry["empty_groups"] >= 0 and entry["map_changes"] >= 0 for entry in log)


def test_a_run_is_one_line_and_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "one_run", lambda *args: {"perplexity_before": 2.0})
    out = tmp_path / "runs.jsonl"
    for _ in range(2):
        options = ["run", "--out", str(out), "--pooling", "source", "--pooling", "mean"]
        result = CliRunner().invoke(app, options)
        assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["pooling"], r["heads"]) for r in lines] == [("source", 2), ("mean", 1)]


@pytest.fixture
def short(monkeypatch):
    """Training in a twelfth of the time."""
    monkeypatch.setattr(example, "VIT_EPOCHS", 1)
    source = example.vit.train("even groups", 8, 0, epochs=2)
    monkeypatch.setattr(example, "trained", lambda seed: source)
    return source


@pytest.mark.parametrize("way", ["average", "clustered, aligned", "KDGQA, per sample", "PGQA"])
def test_a_converted_vision_transformer_is_trained_further(way, short):
    run = example.convert_and_uptrain(way, 4, 0, distill=0.5)
    again = example.convert_and_uptrain(way, 4, 0, distill=0.5)
    assert run == again, "the seed fixes everything"
    assert run["accuracy"] > run["before"] and run["log"][-1]["step"] == 29
    sizes = run["log"][-1]["groups"]
    assert bool(sizes) == (way in ("clustered, aligned", "KDGQA, per sample"))
    assert all(sum(each) == 8 and len(each) == 4 for each in sizes.values())


def test_groups_that_follow_keys_move_until_they_are_frozen(short):
    images, classes = example.vit.digits()
    model = example.converted("KDGQA, per sample", 4, short, images[:100])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def update(batch, progress):
        loss = nn.functional.cross_entropy(model(images[batch]), classes[batch])
        loss.backward()
        optimizer.step()
        return loss.item()

    batches = example.epochs_of(torch.arange(900))
    log = uptrain(model, batches, 20, update=update, log_every=1, progress=False)
    moved = [entry["map_changes"] for entry in log]
    assert moved[0] == 2, "each layer leaves even groups at once"
    assert not any(moved[17:]), "and none moves when 85 % are done"
    assert all(layer.is_frozen for layer in model.modules() if isinstance(layer, KDGQA))
    assert log[0]["empty_groups"] == 2, "the smallest norm of each layer serves nobody"


def test_the_source_and_every_rule_of_the_table_can_be_run(short):
    images, _ = example.vit.digits()
    counts = {way: 0 for way in (*example.CONVERSIONS, *example.KEY_DRIVEN, "source")}
    for way, key_heads in example.VIT_RUNS:
        model = example.converted(way, key_heads, short, images[:60])
        assert all(b.attention.num_key_heads == key_heads for b in model.blocks)
        counts[way] += 1
    assert all(counts.values())


def test_digits_are_lines_and_a_table(tmp_path, monkeypatch, short):
    monkeypatch.setattr(example.vit, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    monkeypatch.setattr(example, "VIT_RUNS", [("average", 2), ("searched, fitted", 2)])
    out = tmp_path / "runs.jsonl"
    for _ in range(2):
        result = CliRunner().invoke(app, ["digits", "--out", str(out), "--seeds", "2"])
        assert result.exit_code == 0, result.output
    runs = example.vit.read(out)
    assert len(runs) == 4
    heads, average, fitted = example.vit.table(runs)
    assert heads[2:4] == ("before, %", "accuracy, %") and average[5] == "" != fitted[5]
    example.vit.draw([runs, runs[:2]], tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 1000
